"""Where a tensor lies in what `torch.save` has written, without reading it.

An archive is a zip file of a pickled description and, uncompressed, the bytes of each storage.
"""

import io
import os
import struct
import zipfile
from typing import IO, Any, NamedTuple, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class _Part(io.RawIOBase):
    """Some bytes of a file as if they were one; PyTorch's own counts from its end wrongly."""

    def __init__(self, file: IO[bytes], begin: int, length: int):
        super().__init__()
        self.file, self.begin, self.length = file, begin, length
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.length}[whence]
        return self.file.seek(self.begin + start + offset) - self.begin

    def tell(self) -> int:
        return self.file.tell() - self.begin

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        left = max(0, self.length - self.tell())
        data = self.file.read(min(left, len(buffer)))
        buffer[: len(data)] = data
        return len(data)


_LOCAL_HEADER = 30  # bytes, of which the last four are the lengths of what follows it
_LENGTHS = struct.Struct("<HH")


class Stored(NamedTuple):
    """One tensor in an archive.

    Attributes:
        shape, dtype, contiguous: of the tensor.
        start: first byte of its data in the archive.
    """

    shape: torch.Size
    dtype: torch.dtype
    contiguous: bool
    start: int


class Archives:
    """Reads archives of which many describe the same: a description is unpickled once."""

    def __init__(self) -> None:
        """Know no description."""
        self._known: dict[bytes, Stored] = {}

    def stored(self, file: IO[bytes], begin: int, length: int) -> Stored:
        """Return what an archive of one tensor holds.

        Args:
            file: in which it is.
            begin, length: where in it, in bytes.
        """
        part = cast(IO[bytes], _Part(file, begin, length))
        found = _records(part)
        if found is None:  # of an older kind, or of several tensors
            return _unpickled(part)
        description, start = found
        if description not in self._known:
            whole = _unpickled(part)
            self._known[description] = whole._replace(start=whole.start - start)
        known = self._known[description]
        return known._replace(start=known.start + start)


def _records(file: IO[bytes]) -> tuple[bytes, int] | None:
    """The description's bytes, and where the only storage begins; None where there is no such."""
    try:
        records = zipfile.ZipFile(file).infolist()
    except zipfile.BadZipFile:
        return None
    storages = [record for record in records if "/data/" in record.filename]
    descriptions = [record for record in records if record.filename.endswith("/data.pkl")]
    if len(storages) != 1 or len(descriptions) != 1:
        return None
    if any(r.compress_type != zipfile.ZIP_STORED for r in (*storages, *descriptions)):
        return None
    file.seek(_begin(file, descriptions[0]))
    # Not by zipfile: it looks at checksums, which are left out where they take long.
    return file.read(descriptions[0].file_size), _begin(file, storages[0])


def _begin(file: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its header, its name and a filling."""
    file.seek(record.header_offset + _LOCAL_HEADER - _LENGTHS.size)
    return record.header_offset + _LOCAL_HEADER + sum(_LENGTHS.unpack(file.read(_LENGTHS.size)))


def _unpickled(file: IO[bytes]) -> Stored:
    """The same by PyTorch, which takes a millisecond."""
    file.seek(0)
    with FakeTensorMode():
        tensor: Any = torch.load(file, weights_only=True)
    start = tensor.untyped_storage()._checkpoint_offset
    start += tensor.storage_offset() * tensor.element_size()
    return Stored(tensor.shape, tensor.dtype, tensor.is_contiguous(), start)

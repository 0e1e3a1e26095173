"""Files of records: where each raw record lies, and what could not be decoded."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_infifpo.cli import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One decoded record, not yet checked.

    Attributes:
        where: "file:line", or "file:record N" (from 0) where lines mean nothing.
        stem: the file's name without its suffixes.
        index: position in the file, from 0, blank lines not counted.
        value: the decoded value; None where `error` is set.
        error: what kept the record from being decoded.
    """

    where: str
    stem: str
    index: int
    value: Any
    error: str | None = None


def iter_raw(path: Path) -> Iterator[RawRecord]:
    """Yield every record of one file.

    Raises:
        UserError: the file is absent or unreadable as a whole, or its kind is unknown.
    """
    suffix = next((s for s in sorted(SUFFIXES, key=len)[::-1] if path.name.endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a file of preference records")
    stem = path.name.removesuffix(suffix)
    if suffix == ".parquet":
        yield from _iter_parquet(path, stem)
        return
    try:
        with _open(path) as stream:
            if suffix.startswith(".json") and not suffix.startswith(".jsonl"):
                start = _first_byte(stream)
                stream.seek(0)
                if start == b"[":
                    yield from _iter_array(path, stem, stream)
                    return
            yield from _iter_lines(path, stem, stream)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error}), expected a complete one") from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _first_byte(stream: IO[bytes]) -> bytes:
    """Return the first byte that is neither white space nor of a byte order mark."""
    while byte := stream.read(1):
        if not byte.isspace() and byte not in b"\xef\xbb\xbf":
            return byte
    return b""


def _iter_lines(path: Path, stem: str, stream: IO[bytes]) -> Iterator[RawRecord]:
    """Yield one record a line of JSONL."""
    index = 0
    for number, line in enumerate(stream, start=1):
        # "utf-8-sig" drops the byte order mark that some editors write at the start.
        codec = "utf-8-sig" if number == 1 else "utf-8"
        value, error = None, None
        try:
            text = line.decode(codec)
            if not text.strip():
                continue
            value = json.loads(text)
        except json.JSONDecodeError as problem:
            error = (
                f"broken JSON ({problem.msg} at column {problem.colno}), expected one object a line"
            )
        except UnicodeDecodeError as problem:
            error = f"not UTF-8 (byte {problem.start} of the line), expected UTF-8 text"
        except RecursionError:
            error = "JSON is nested too deeply, expected one record a line"
        yield RawRecord(f"{path}:{number}", stem, index, value, error)
        index += 1


def _iter_array(path: Path, stem: str, stream: IO[bytes]) -> Iterator[RawRecord]:
    """Yield the elements of a file that is one JSON array."""
    try:
        values = json.loads(stream.read().decode("utf-8-sig"))
    except json.JSONDecodeError as problem:
        raise UserError(
            f"{path}:{problem.lineno}: broken JSON ({problem.msg} at column {problem.colno}), "
            "expected one array of records"
        ) from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{path}: not UTF-8 (byte {problem.start}), expected UTF-8 text") from None
    except RecursionError:
        raise UserError(
            f"{path}: JSON is nested too deeply, expected an array of records"
        ) from None
    for index, value in enumerate(values):
        yield RawRecord(f"{path}:record {index}", stem, index, value)


def _iter_parquet(path: Path, stem: str) -> Iterator[RawRecord]:
    """Yield the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs the package pyarrow; install it or convert to JSONL"
        ) from None
    index = 0
    try:
        # Opened here: ParquetFile(path) leaves the file open when the content is broken.
        with path.open("rb") as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    yield RawRecord(f"{path}:record {index}", stem, index, value)
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: broken Parquet file after record {index} ({str(error).splitlines()[0]}), "
            "expected a complete one"
        ) from None

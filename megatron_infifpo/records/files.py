"""Files of records: where each raw record lies, and what could not be decoded."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.arrow_files import arrow_rows, folder_rows, open_zstd, parquet_rows

KINDS = (".jsonl", ".json", ".csv")
SUFFIXES = (
    *(kind + packed for kind in KINDS for packed in ("", ".gz", ".zst")),
    ".parquet",
    ".arrow",
)
TABLES = {"": folder_rows, ".parquet": parquet_rows, ".arrow": arrow_rows}
BOM = b"\xef\xbb\xbf"
LARGEST_FIELD = 2**31 - 1  # of .csv, where Python takes 128 KiB


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One decoded record, not yet checked.

    Attributes:
        where: "file:line", or "file:record N" (from 0) where lines mean nothing.
        stem: the file's name without its suffixes; by `iter_files`, enough of its path to tell it
            from the other files.
        index: position in the file, from 0, blank lines not counted.
        value: the decoded value; None where `error` is set.
        error: what kept the record from being decoded.
    """

    where: str
    stem: str
    index: int
    value: Any
    error: str | None = None

    @property
    def default_id(self) -> str:
        """The id of a record that has none."""
        return f"{self.stem}-{self.index}"


def iter_files(paths: Sequence[Path]) -> Iterator[RawRecord]:
    """Yield every record of files; a file without any is one record with an error.

    Raises:
        UserError: as `iter_raw` does.
    """
    for path, stem in zip(paths, stems(paths), strict=True):
        empty = True
        for raw in iter_raw(path, stem):
            empty = False
            yield raw
        if empty:
            yield RawRecord(str(path), stem, 0, None, "the file has no records, expected some")


def iter_raw(
    path: Path, stem: str | None = None, *, wanted: str = "preference records"
) -> Iterator[RawRecord]:
    """Yield every record of one file, or of one folder that `datasets` saved.

    Args:
        path: the file.
        stem: of the records' default ids (default: the file's name without its suffixes).
        wanted: what the file should have, for the error where there is none.

    Raises:
        UserError: the file is absent or unreadable as a whole, or its kind is unknown.
    """
    suffix = suffix_of(path, wanted)
    stem = stem or path.name.removesuffix(suffix)
    if suffix in TABLES:
        for index, (value, error) in enumerate(TABLES[suffix](path)):
            yield RawRecord(f"{path}:record {index}", stem, index, value, error)
        return
    try:
        with _open(path) as stream:
            if suffix.startswith(".csv"):
                yield from _iter_csv(path, stem, stream)
            elif suffix.startswith(".jsonl") or not _is_array(path):
                yield from _iter_lines(path, stem, stream)
            else:
                yield from _iter_array(path, stem, stream)
    except (EOFError, zlib.error, OSError) as error:
        packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        if packed is None or isinstance(error, PermissionError):
            raise UserError(f"{path} cannot be read ({error}), expected a readable file") from None
        raise UserError(
            f"{path}: broken {packed} file ({error}), expected a complete one"
        ) from None


def suffix_of(path: Path, wanted: str) -> str:
    """Return a file's suffix in `SUFFIXES`, "" for a folder; `wanted` is what it should have.

    Raises:
        UserError: there is no such file, or it is of an unknown kind.
    """
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if path.is_dir():
        return ""
    if not path.exists():
        hub = suffix is None and len(path.parts) == 2 and not path.is_absolute()
        fix = (
            f"; to read a data set of the Hugging Face hub, download it (hf download {path} "
            "--repo-type dataset --local-dir DIR) and give its files"
        )
        raise UserError(f"{path}: no such file, expected a file of {wanted}{fix if hub else ''}")
    if suffix is None:
        raise UserError(
            f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}, or a folder "
            "that datasets.Dataset.save_to_disk wrote"
        )
    return suffix


def stems(paths: Sequence[Path]) -> list[str]:
    """Return what the default ids of each file's records begin with.

    It is the file's name without suffixes; of several files of one name, so much of their absolute
    paths as tells them apart, wherever the command runs.
    """
    whole = [Path(os.path.abspath(path)) for path in paths]
    plain = [path.name.removesuffix(_known_suffix(path)) for path in whole]
    found = []
    for path, stem in zip(whole, plain, strict=True):
        others = {p for p, s in zip(whole, plain, strict=True) if s == stem and p != path}
        if others:
            beside = any(p.parent == path.parent for p in others)
            stem = _tail(path, others, path.name if beside else stem)
        found.append(stem)
    return found


def _tail(path: Path, others: Iterable[Path], name: str) -> str:
    """Return the shortest end of a path that no other path has, with another last name."""
    folders = path.parent.parts
    for length in range(1, len(folders) + 1):
        end = folders[-length:]
        if not any(p.parent.parts[-length:] == end and p.parent != path.parent for p in others):
            return "/".join((*end, name)).replace("//", "/")
    return str(path.with_name(name))


def _known_suffix(path: Path) -> str:
    return next((s for s in SUFFIXES if path.name.endswith(s)), "")


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        return open_zstd(path)
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _is_array(path: Path) -> bool:
    """Whether the first byte that is neither white space nor a byte order mark's opens an array."""
    with _open(path) as stream:
        while byte := stream.read(1):
            if not byte.isspace() and byte not in BOM:
                return byte == b"["
    return False


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
        except ValueError as problem:  # a number of more digits than Python takes
            error = f"broken JSON ({problem}), expected one object a line"
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
    except ValueError as problem:
        raise UserError(f"{path}: broken JSON ({problem}), expected an array of records") from None
    except RecursionError:
        raise UserError(
            f"{path}: JSON is nested too deeply, expected an array of records"
        ) from None
    for index, value in enumerate(values):
        yield RawRecord(f"{path}:record {index}", stem, index, value)


def _iter_csv(path: Path, stem: str, stream: IO[bytes]) -> Iterator[RawRecord]:
    """Yield the rows of a table with a header; an empty cell is an absent field."""
    csv.field_size_limit(LARGEST_FIELD)
    if stream.peek(3)[:3] == BOM:  # type: ignore[attr-defined]
        stream.read(3)
    # Bytes that are not UTF-8 come out as what no text can have, and are found below.
    rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in stream), strict=True)
    header: list[str] | None = None
    index = 0
    while True:
        line, error, row = rows.line_num + 1, None, list[str]()
        try:
            row = next(rows)
            "".join(row).encode()
        except StopIteration:
            return
        except csv.Error as problem:
            error = f"broken CSV ({problem}), expected values with quotes around line breaks"
        except UnicodeEncodeError:
            error = "not UTF-8, expected UTF-8 text"
        if header is None:
            if error or not row or len(set(row)) != len(row):
                raise UserError(
                    f"{path}:{line}: {error or 'the columns have no names of their own'}; expected "
                    "a header with the names of the columns"
                )
            header = row
            continue
        if error is None and not row:
            continue
        if error is None and len(row) != len(header):
            error = f"{len(row)} values, expected {len(header)}, as the header has"
        value = None if error else {k: v for k, v in zip(header, row, strict=True) if v}
        yield RawRecord(f"{path}:{line}", stem, index, value, error)
        index += 1

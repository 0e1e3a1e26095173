"""What needs pyarrow: Parquet files, folders that `datasets` saved, and zstd streams."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from megatron_infifpo.errors import UserError

ROWS = 1024
Rows = Iterator[tuple[Any, str | None]]
"""A row's value, or None and what kept it from being decoded."""


def pyarrow_for(path: Path) -> Any:
    """Import pyarrow.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: reading it needs the package pyarrow; install it or convert to JSONL"
        ) from None
    return pyarrow


def open_zstd(path: Path) -> IO[bytes]:
    """Open a file that zstd compressed; reading a broken one raises OSError."""
    stream = pyarrow_for(path).input_stream(str(path), compression="zstd")
    return cast(IO[bytes], io.BufferedReader(stream))


def parquet_rows(path: Path) -> Rows:
    """Yield the rows of a Parquet file.

    Raises:
        UserError: it is broken.
    """
    pyarrow, done = pyarrow_for(path), 0
    try:
        # Opened here: ParquetFile(path) leaves the file open when the content is broken.
        with path.open("rb") as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=ROWS):
                yield from _rows(batch)
                done += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: broken Parquet file after record {done} ({str(error).splitlines()[0]}), "
            "expected a complete one"
        ) from None


def folder_rows(path: Path) -> Rows:
    """Yield the rows of a folder that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        UserError: it is another folder, or it is broken.
    """
    for name in _arrow_files(path):
        yield from arrow_rows(path / name)


def arrow_rows(path: Path) -> Rows:
    """Yield the rows of an Arrow stream, such as `datasets` keeps.

    Raises:
        UserError: it is broken.
    """
    pyarrow, done = pyarrow_for(path), 0
    try:
        with path.open("rb") as stream:
            for batch in pyarrow.ipc.open_stream(stream):
                # A stranger's offsets may point anywhere; Parquet's are computed.
                yield from _rows(batch, check=lambda part: part.validate(full=True))
                done += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: broken Arrow stream after record {done} ({str(error).splitlines()[0]}), "
            "expected a complete one"
        ) from None


def _arrow_files(path: Path) -> list[str]:
    """Return the names of a folder's data files, in order."""
    splits = _read_json(path / "dataset_dict.json")
    if splits is not None:
        names = splits.get("splits") if isinstance(splits, dict) else None
        found = [str(name) for name in names] if isinstance(names, list) else ["train"]
        raise UserError(
            f"{path} holds the splits {', '.join(found)}, expected one data set: give "
            f"{path / found[0] if found else path}"
        )
    state = _read_json(path / "state.json")
    if state is None:
        inside = sorted(p.name for p in path.iterdir())[:5]
        raise UserError(
            f"{path} is a folder with {', '.join(inside) or 'nothing in it'}, expected one that "
            "datasets.Dataset.save_to_disk wrote (with state.json); of other folders give the "
            "files"
        )
    files = state.get("_data_files") if isinstance(state, dict) else None
    names = [f.get("filename") for f in files or () if isinstance(f, dict)]
    if not names or not all(isinstance(n, str) and Path(n).name == n != ".." for n in names):
        raise UserError(f"{path}/state.json names no data files, expected those beside it")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{path} is a selection of rows in an old format, expected plain rows: load it with "
            "datasets.load_from_disk, then flatten_indices() and save_to_disk"
        )
    return names


def _read_json(path: Path) -> Any:
    """Return what a small JSON file holds; None if it is not there."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}), expected what datasets wrote") from None


def _rows(batch: Any, check: Callable[[Any], None] = lambda part: None) -> Rows:
    """Yield a batch's rows; where it cannot be decoded, those that can be, one by one."""
    cleaner = _struct_cleaner(batch.schema)
    try:
        check(batch)
        values = [cleaner(value) for value in batch.to_pylist()]
    except (ValueError, OverflowError, RecursionError) as error:  # UnicodeDecodeError is one
        if len(batch) == 1:
            yield None, _undecodable(batch, check, error)
            return
    else:
        yield from ((value, None) for value in values)
        return
    for row in range(len(batch)):
        yield from _rows(batch.slice(row, 1), check)


def _undecodable(row: Any, check: Callable[[Any], None], error: Exception) -> str:
    """Say which column of a row cannot be decoded."""
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            check(column)
            column.to_pylist()
        except UnicodeDecodeError as problem:
            return f"column {name!r} is not UTF-8 (byte {problem.start} of a text), expected UTF-8"
        except (ValueError, OverflowError) as problem:
            said = str(problem).splitlines()[0]
            what = "is not UTF-8" if "UTF8" in said else "cannot be decoded"
            return f"column {name!r} {what} ({said}), expected a valid row"
    return f"it cannot be decoded ({str(error).splitlines()[0]}), expected a valid row"


def _struct_cleaner(fields: Any) -> Callable[[Any], Any]:
    """Return what takes out of objects the nulls that a table puts where a key is absent."""
    inner = {f.name: clean for f in fields if (clean := _cleaner(f.type)) is not None}

    def cleaned(value: Any) -> Any:
        if value is None:
            return None
        return {
            name: inner[name](item) if name in inner else item
            for name, item in value.items()
            if item is not None
        }

    return cleaned


def _cleaner(kind: Any) -> Callable[[Any], Any] | None:
    """Return what makes a column's values what JSON would have, or None: they are."""
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: value if value is None else json.loads(value)
    if types.is_struct(kind):
        return _struct_cleaner(kind)
    if types.is_map(kind):
        return lambda value: value if value is None else dict(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _cleaner(kind.value_type)
        if inner is not None:
            return lambda value: value if value is None else [inner(item) for item in value]
    return None

"""Rows of a data set that lies in files: JSON lines, CSV or parquet, also gzipped.

Which files hold a split, and their rows, each with its place (`train.jsonl:17`). What a row has to hold is the
environment's to say.
"""

import contextlib
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

KINDS = ("jsonl", "jsonl.gz", "parquet", "csv", "csv.gz")
"""The endings that are looked for in a folder. Only files of the first that is there are read: others may be copies."""


def split_files(split: str, path: Path) -> list[Path]:
    """The files that hold a split: `path` itself if it is a file, whatever the split, or those of a folder.

    In a folder they have the hub's names, `train.jsonl` or `train-00000-of-00002.parquet`, and lie in it directly, or else in
    its `main`, or else in one other folder below it. So the configuration `main` of a clone of the hub's data set is read, as
    from the hub. Hidden folders are passed over.

    Raises:
        ValueError: there are none, or in several folders, which may hold the same problems; one line.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; --dataset takes a JSONL file or a folder that holds {split}.jsonl"
            )
        return [path]
    named = re.compile(rf"{split}([-.]\d.*)?\.({'|'.join(map(re.escape, KINDS))})")
    found: dict[Path, list[Path]] = {}
    for file in sorted(path.rglob(f"{split}*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if named.fullmatch(file.name) and file.is_file() and not hidden:
            found.setdefault(file.parent, []).append(file)
    if not found:
        raise ValueError(f"{path} holds no {split}.jsonl (nor {split}.jsonl.gz, {split}*.parquet or {split}*.csv)")
    folder = next((one for one in (path, path / "main") if one in found), next(iter(found)))
    if len(found) > 1 and folder not in (path, path / "main"):
        names = ", ".join(sorted(f"{one.relative_to(path)}/" for one in found))
        raise ValueError(f"{path} holds {split} files in several folders ({names}): give one of them to --dataset")
    kind = next(kind for kind in KINDS if any(file.name.endswith(f".{kind}") for file in found[folder]))
    return [file for file in found[folder] if file.name.endswith(f".{kind}")]


def read_rows(files: Iterable[Path]) -> Iterator[tuple[str, object]]:
    """(place, row) of every row of `files`, a place being `FILE:LINE`, or `FILE:ROW` in a table, from 1.

    Raises:
        ValueError: a file or a row cannot be read; one line that names it.
    """
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows}
    for file in files:
        read = readers.get(Path(file.name.removesuffix(".gz")).suffix, _jsonl_rows)
        with _unpacked(file) as stream:
            yield from read(file, stream)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The file, decompressed if it begins as gzip does, whatever its name."""
    with path.open("rb") as file:
        if not file.peek(2).startswith(b"\x1f\x8b"):
            yield file
            return
        with gzip.open(file) as unpacked:
            try:
                yield cast(BinaryIO, unpacked)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: not a gzip file that can be read ({error})") from error


def _jsonl_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, start=1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield place, json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
        except RecursionError as error:
            raise ValueError(f"{place}: not a row (nested too deeply)") from error
        except ValueError as error:  # Python reads no longer whole number from text
            digits = sys.get_int_max_str_digits()
            raise ValueError(f"{place}: not a row (a number of more than {digits} digits)") from error


def _csv_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    number = 0
    lines = (line.decode("utf-8-sig") for line in file)
    try:
        # Strict: a quote that is never closed is an error, and not the rest of the file in one field.
        for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
            if None in row:
                raise csv.Error("more fields than the first line names")
            yield f"{path}:{number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a csv file that can be read ({error}, after {number} rows)") from error


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {path} needs the package {error.name}: run `uv sync --extra examples`, or turn it into a JSONL file"
        ) from error

    try:
        rows = ParquetFile(file).read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a parquet file that can be read ({reason})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row

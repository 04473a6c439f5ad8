"""The problems of a data set on the hub, or in files: JSON lines, CSV or parquet, also gzipped.

Every row has its place (`train.jsonl:17`), which begins the message where the row is not what it has to be.
"""

import csv
import gzip
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, cast

from ludic.task.numbers import MAX_ANSWER_CHARS

KINDS = ("jsonl", "jsonl.gz", "parquet", "csv", "csv.gz")
"""The endings that are looked for in a folder. Only files of the first that is there are read: others may be copies."""


class QuestionWithTarget(Protocol):
    """What `load_samples` makes of a row: a frozen dataclass with at least these two."""

    @property
    def question(self) -> str: ...
    @property
    def target(self) -> str: ...


SampleT = TypeVar("SampleT", bound=QuestionWithTarget)


def load_samples(
    split: str,
    *,
    hub: tuple[str, str | None],
    fields: Sequence[str],
    make: Callable[..., SampleT],
    dataset: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[SampleT]:
    """The samples of a split, in their order, or shuffled by `seed`; the first `limit` of those.

    Args:
        hub: the data set's name there and its configuration, if it has several.
        fields: those of a row that are used, each a text.
        make: a sample from the row's place and its `fields`, in their order; raises ValueError where they make none.
        dataset: None for the Hugging Face hub, or a file or folder as in `split_files`.
        say: gets a line on what was read, and one each if questions are repeated or targets too long.

    Raises:
        ValueError: the data cannot be had, a row is malformed (`test.jsonl:17: ...`), or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}; leave it out for the whole split")
    if dataset is None:
        source, rows = f"{hub[0]} (hub)", _hub_rows(*hub, split)
    else:
        files = split_files(split, Path(dataset))
        others = f" and {len(files) - 1} more beside it" if len(files) > 1 else ""
        source, rows = f"{files[0]}{others}", read_rows(files)
    samples = [make(place, *_texts(place, row, fields)) for place, row in rows]
    if not samples:
        raise ValueError(f"{dataset or hub[0]} holds no rows for the split {split!r}")
    if seed is not None:
        random.Random(seed).shuffle(samples)
    used = samples[:limit]
    say(f"{len(used)} problems" + (f" of the {len(samples)}" if len(used) < len(samples) else "") + f" in {source}")
    for line in _warnings(used):
        say(f"warning: {line}")
    return used


def _warnings(samples: Sequence[QuestionWithTarget]) -> Iterator[str]:
    questions = Counter(sample.question.strip() for sample in samples)
    question, count = questions.most_common(1)[0]
    if count > 1:
        yield (
            f"{len(samples) - len(questions)} of these problems repeat the question of another (one is there {count} times: "
            f"{question!r:.60}), and count again: intervals are too narrow"
        )
    if too_long := sum(len(sample.target) > MAX_ANSWER_CHARS for sample in samples):
        yield (
            f"{too_long} of these problems have a target of more than {MAX_ANSWER_CHARS} characters, which is not "
            "graded: every answer to them counts as wrong"
        )


def _hub_rows(hub_id: str, config: str | None, split: str) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ValueError(
            f"loading {hub_id} from the hub needs the package {error.name}: run `uv sync --extra examples`, "
            "or give a local file or folder with --dataset"
        ) from error
    try:
        rows = load_dataset(hub_id, config, split=split)
    except OSError as error:  # Every way in which the hub is out of reach; the library's own errors derive from it.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot load {hub_id} from the hub ({reason}); give a local file or folder with --dataset"
        ) from error
    return ((f"{hub_id}/{split}:{i}", row) for i, row in enumerate(cast(Iterable[object], rows), start=1))


def _texts(place: str, row: object, fields: Sequence[str]) -> list[str]:
    if not isinstance(row, dict):
        names = " and ".join(f"`{name}`" for name in fields)
        raise ValueError(f"{place}: a row must be an object with {names}, not {_kind(row)}")
    return [_text(place, row, name) for name in fields]


def _text(place: str, row: dict[str, object], name: str) -> str:
    if name not in row:
        raise ValueError(f"{place}: no `{name}`")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: `{name}` must be a string, not {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{place}: `{name}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: `{name}` holds half a surrogate pair at character {error.start}") from error
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def split_files(split: str, path: Path) -> list[Path]:
    """The files that hold a split: `path` itself if it is a file, whatever the split, or those of a folder.

    In a folder they have the hub's names, `train.jsonl` or `train-00000-of-00002.parquet`, and lie in it directly, or else in
    its `main` (as in a clone of the hub's data set), or else in one other folder below it that is not hidden.

    Raises:
        ValueError: there are none, or in several folders, which may hold the same problems; one line.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; --dataset takes a JSONL file or a folder that holds {split}.jsonl")
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
    for path in files:
        read = readers.get(Path(path.name.removesuffix(".gz")).suffix, _jsonl_rows)
        with path.open("rb") as file:
            if not file.peek(2).startswith(b"\x1f\x8b"):
                yield from read(path, file)
                continue
            try:  # it begins as gzip does, whatever its name
                with gzip.open(file) as unpacked:
                    yield from read(path, cast(BinaryIO, unpacked))
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path}: not a gzip file that can be read ({error})") from error


def _jsonl_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: {_why_not_json(error)}") from error
        yield f"{path}:{number}", row


def _why_not_json(error: Exception) -> str:
    match error:
        case UnicodeDecodeError():
            return f"not UTF-8 ({error.reason} at byte {error.start})"
        case json.JSONDecodeError():
            return f"not JSON ({error.msg} at column {error.colno})"
        case RecursionError():
            return "not a row (nested too deeply)"
    return f"not a row (a number of more than {sys.get_int_max_str_digits()} digits)"  # Python reads no longer one


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

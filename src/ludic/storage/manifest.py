"""A checkpoint's table of contents: the size and the SHA-256 of every file, written last.

A folder without it is unfinished. One with it is whole if every file is there, as long as it was and with the same bytes;
a file beside them that a model loader would read counts as damage too, since it could change what is loaded.

Left out: every defence against a user who can write into the folder, which SECURITY.md declares trusted.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ludic.storage.inert import inert

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_MESSAGE_LIMIT = 2_000
_NUM_THREADS = 4  # a checkpoint has two large files; hashing and syncing let go of the interpreter's lock
_READ_BY_LOADERS = {".json", ".safetensors", ".bin", ".pt", ".pth", ".py", ".jinja", ".model"}


class CheckpointError(OSError):
    """A checkpoint could not be written or read; one line with the path and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(inert(message, _MESSAGE_LIMIT))


def write_manifest(folder: Path) -> None:
    """Put every file of `folder` on the disk, and then the manifest of them.

    Raises:
        OSError: the disk is full or failing.
    """
    paths = _files(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        files = dict(zip(names, threads.map(_digest_and_sync, paths), strict=True))
    with (folder / MANIFEST_FILE).open("w") as file:
        json.dump({"format": _FORMAT, "files": files}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    for inside in sorted({path.parent for path in paths} | {folder}):
        sync_folder(inside)


def verify_checkpoint(checkpoint: Path) -> None:
    """Hold every file of a checkpoint against its manifest; about a second for 2 GB and core.

    Raises:
        CheckpointError: names the first file that is missing, truncated, altered or added.
    """
    files = _read_manifest(checkpoint)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        list(threads.map(lambda name: _check_file(checkpoint / name, *files[name]), files))
    _check_nothing_added(checkpoint, files)


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` but the manifest, in the order of the names."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return [path for path in paths if path != folder / MANIFEST_FILE]


def _digest_and_sync(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:  # just written, so it is read from memory
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": digest}


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by name."""
    path = checkpoint / MANIFEST_FILE
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a checkpoint: there is no such folder")
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint} is not a finished checkpoint of this version: it has no {MANIFEST_FILE}; "
            f"--model {checkpoint} starts a new run with its weights"
        )
    record = read_json(path)
    if record.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is of format {record.get('format')!r:.40}, this version reads {_FORMAT}")
    try:
        return {name: (int(entry["size"]), entry["sha256"]) for name, entry in sorted(record["files"].items())}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: a size and a SHA-256 for every file were expected") from error


def _check_file(path: Path, size: int, digest: str) -> None:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            intact = found == size and hashlib.file_digest(file, "sha256").hexdigest() == digest
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"{path!s:.200} cannot be read: {error}") from error
    if found != size:
        raise CheckpointError(f"{path} {'is truncated' if found < size else 'was altered'}: {found} bytes, not {size}")
    if not intact:
        raise CheckpointError(f"{path} was altered: its SHA-256 is not that of {MANIFEST_FILE}")


def _check_nothing_added(checkpoint: Path, files: Mapping[str, object]) -> None:
    try:
        paths = _files(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error.strerror or error}") from error
    for path in paths:
        if path.suffix in _READ_BY_LOADERS and path.relative_to(checkpoint).as_posix() not in files:
            raise CheckpointError(f"{path} was added after the checkpoint was written: move it elsewhere")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: it is not there or it is something else; one line with the path.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} cannot be read: a JSON object was expected, not {type(record).__name__}")
    return record

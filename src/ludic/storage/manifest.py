"""A checkpoint's table of contents: the size and the SHA-256 of every file, written last.

A folder without it is unfinished. One with it is whole if every file is there, as long as it was and with the same bytes;
a file beside them that a model loader would read counts as damage too, since it could change what is loaded.

Left out: a signature. A checksum finds what a disk, a copy or a person changed by accident; whoever can write into the
folder can write a manifest that fits. What is read from it is nevertheless held to the folder: names with `..`, absolute
names and symbolic links are refused.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from ludic.storage.inert import inert

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_MAX_JSON_BYTES = 64 << 20
_MAX_DEPTH = 32
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
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        entries = list(threads.map(_digest_and_sync, paths))
    record = {
        "format": _FORMAT,
        "files": {
            path.relative_to(folder).as_posix(): {"size": size, "sha256": digest}
            for path, (size, digest) in zip(paths, entries, strict=True)
        },
    }
    manifest = folder / MANIFEST_FILE
    with manifest.open("w") as file:
        json.dump(record, file, indent=2)
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
    for name, (size, _) in files.items():
        with _open_inside(checkpoint, name) as file:
            found = os.fstat(file.fileno()).st_size
        if found < size:
            raise CheckpointError(f"{checkpoint / name} is truncated: {found} bytes, not {size}")
        if found > size:
            raise CheckpointError(f"{checkpoint / name} was altered: {found} bytes, not {size}")
    _check_nothing_added(checkpoint, files)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        digests = threads.map(lambda name: _digest_inside(checkpoint, name), files)
        for (name, (_, expected)), found_digest in zip(files.items(), digests, strict=True):
            if found_digest != expected:
                raise CheckpointError(f"{checkpoint / name} was altered: its SHA-256 is not that of {MANIFEST_FILE}")


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` but the manifest, in the order of the names."""
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return [path for path in paths if path != folder / MANIFEST_FILE]


def _digest_and_sync(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:  # just written, so it is read from memory
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def _digest_inside(folder: Path, name: str) -> str:
    with _open_inside(folder, name) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading: whatever the bytes, the answer is a value or a CheckpointError -------------------------------------------


def _read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by name."""
    path = checkpoint / MANIFEST_FILE
    if not os.path.isdir(checkpoint):
        raise CheckpointError(f"{checkpoint} is not a checkpoint: there is no such folder")
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{checkpoint} is not a finished checkpoint of this version: it has no {MANIFEST_FILE}; "
            f"--model {checkpoint} starts a new run with its weights"
        )
    record = read_json(path)
    files = record.get("files")
    if record.get("format") != _FORMAT or isinstance(record["format"], bool):
        raise CheckpointError(f"{path} is of format {record.get('format')!r:.40}, this version reads {_FORMAT}")
    if not isinstance(files, dict) or set(record) != {"format", "files"}:
        raise CheckpointError(f"{path} cannot be read: format and files were expected")
    return {name: _read_entry(path, name, entry) for name, entry in sorted(files.items())}


def _read_entry(path: Path, name: str, entry: object) -> tuple[int, str]:
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise CheckpointError(f"{path} names {name!r:.80}, which is no file of the folder")
    if isinstance(entry, dict) and set(entry) == {"size", "sha256"}:
        size, digest = entry["size"], entry["sha256"]
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if whole and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest):
            return size, digest
    raise CheckpointError(f"{path} cannot be read: {name!r:.80} lacks a size and a SHA-256")


def _check_nothing_added(checkpoint: Path, files: Mapping[str, object]) -> None:
    try:
        paths = _files(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {_reason(error)}") from error
    for path in paths:
        if path.suffix in _READ_BY_LOADERS and path.relative_to(checkpoint).as_posix() not in files:
            raise CheckpointError(f"{path} was added after the checkpoint was written: move it elsewhere")


def _open_inside(folder: Path, name: str) -> BufferedReader:
    """A file of `folder`, through no symbolic link.

    Raises:
        CheckpointError: it is not there, or no file.
    """
    path = folder
    try:
        *parents, _ = name.split("/")
        for parent in parents:
            path = path / parent
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise CheckpointError(f"{path} is no folder")
        return open_regular(folder / name)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / name} is missing") from None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that this file system cannot have
        raise CheckpointError(f"{folder / name!s:.200} cannot be read: {_reason(error)}") from error


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, if it is one: no symbolic link, and no pipe that would be waited for.

    Raises:
        CheckpointError: it is something else.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a symbolic link, not a file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`: UTF-8, finite numbers, not nested beyond reason.

    Raises:
        CheckpointError: it is not there or it is something else; one line with the path.
    """
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_JSON_BYTES:
                raise CheckpointError(f"{path} cannot be read: it is larger than {_MAX_JSON_BYTES >> 20} MiB")
            text = file.read().decode("utf-8")
        record = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        _check_depth(record, _MAX_DEPTH)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} cannot be read: a JSON object was expected, not {type(record).__name__}")
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is out of range")
    return value


def _check_depth(value: object, left: int) -> None:
    if left == 0:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_depth(item, left - 1)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)[:200]

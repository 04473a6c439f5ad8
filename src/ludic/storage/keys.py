"""The server's API key: read from a file or the environment, never from the command line, which every process can read.

Left out: keyrings, and keys that change during a run.
"""

import logging
import os
import re
import stat
from collections.abc import Mapping

logger = logging.getLogger(__name__)

KEY_VARIABLES = ("LUDIC_API_KEY", "VLLM_API_KEY")
"""Where a key is looked for, the first that is set, when no file is given."""
MAX_KEY_CHARS = 4_096
MAX_FILE_BYTES = 65_536
_KEY = re.compile(r"[!-~]+")
"""What can stand behind `Bearer `: visible ASCII without spaces."""
_SECRET = re.compile(r"(^|_)(KEYS?|TOKENS?|SECRETS?)($|_)|PASSW(OR)?D|PASSPHRASE|CREDENTIAL", re.IGNORECASE)


def read_api_key(key_file: str | None) -> str | None:
    """The key to send: the first in `key_file`, else LUDIC_API_KEY, else VLLM_API_KEY; None where none of them is given.

    Raises:
        ValueError: as `read_key_file`, or as `check_key` of the variable.
    """
    if key_file is not None:
        return read_key_file(key_file)[0]
    for name in KEY_VARIABLES:
        if name in os.environ:
            return check_key(os.environ[name], name)
    return None


def take_api_keys(key_file: str | None) -> list[str]:
    """The keys that the server accepts: those in `key_file`, else those of LUDIC_API_KEY and VLLM_API_KEY; none is [].

    The variables are removed, so that no process that this one starts inherits them.

    Raises:
        ValueError: as `read_api_key`.
    """
    given = [(os.environ.pop(name, "").strip(), name) for name in KEY_VARIABLES]
    if key_file is not None:
        return read_key_file(key_file)
    return list(dict.fromkeys(check_key(key, name) for key, name in given if key))


def read_key_file(path: str) -> list[str]:
    """The keys in a file, one a line, each once; server and clients read the same files. Empty lines do not count.

    A file that every user may read is warned of and not refused: that is how containers are given their secrets. One that
    others may write is refused, since they would choose the key.

    Raises:
        ValueError: it holds no key, or a line that is not a key; it cannot be read, or others may write it. One line.
    """
    source = f"--api-key-file {path}"
    lines = _read(path).replace("\r\n", "\n").split("\n")
    keys = list(dict.fromkeys(line.strip(" ") for line in lines if line.strip(" ")))
    if not keys:
        raise ValueError(f"{source} holds no key: write one into it, or leave the flag out for a server without one")
    return [check_key(key, source) for key in keys]


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what is named like a secret (`*_KEY`, `*_TOKEN`, `*_SECRET`, `*_PASSWORD`, ...).

    For a child that works on a model's output or a stranger's data: what it does not know, it cannot give away.

    Example:
        >>> without_secrets({"PATH": "/bin", "LUDIC_API_KEY": "k", "HF_TOKEN": "t", "TOKENIZERS_PARALLELISM": "false"})
        {'PATH': '/bin', 'TOKENIZERS_PARALLELISM': 'false'}
    """
    return {name: value for name, value in environment.items() if not _SECRET.search(name)}


_pipes: dict[tuple[int, int], str] = {}
"""What came through a pipe, by device and inode: it comes once, and several parts of a run ask for it."""


def _read(path: str) -> str:
    """The text of the key file; its permissions are those of what was opened, not of what the name meant before."""
    try:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            mode, pipe = about.st_mode, (about.st_dev, about.st_ino)
            if pipe in _pipes:
                return _pipes[pipe]
            if stat.S_ISREG(mode) and mode & 0o022:
                raise ValueError(
                    f"--api-key-file {path} may be written by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}"
                )
            if stat.S_ISREG(mode) and mode & stat.S_IROTH:
                logger.warning("ATTENTION: every user of this machine can read %s: chmod 600 it", path)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"--api-key-file {path} cannot be read ({error.strerror}): give a file with the key") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(
            f"--api-key-file {path} holds more than {MAX_FILE_BYTES} bytes: one key a line, and nothing else"
        )
    text = content.decode("latin-1")
    if stat.S_ISFIFO(mode):
        _pipes[pipe] = text
    return text


def check_key(key: str, source: str) -> str:
    """`key`, if it can stand in a header; `source` names where it comes from in the error.

    Raises:
        ValueError: one line that does not show it.
    """
    if not key:
        raise ValueError(f"{source} is empty: put the server's key there, or leave it out for a server without one")
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"{source} holds more than {MAX_KEY_CHARS} characters, which is no key: one line with the key")
    if "\n" in key:
        raise ValueError(f"{source} holds several lines: it must hold the key alone, on one line")
    if not _KEY.fullmatch(key):
        raise ValueError(f"{source} holds spaces or characters outside ASCII, which no HTTP header carries: one word")
    return key

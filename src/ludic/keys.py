"""The server's API key: read from a file or the environment, never from the command line, which every process can read.

And the other half of keeping it: `without_secrets`, for child processes that look at what others wrote and need no key.
Left out: keyrings, and keys that change during a run.
"""

import os
import re
import stat
from collections.abc import Mapping

KEY_VARIABLES = ("LUDIC_API_KEY", "VLLM_API_KEY")
"""Where a key is looked for, the first that is set, when no file is given."""
MAX_KEY_CHARS = 4_096
_KEY = re.compile(r"[!-~]+")
"""What can stand behind `Bearer `: visible ASCII without spaces."""
_SECRET = re.compile(r"(^|_)(KEYS?|TOKENS?|SECRETS?)($|_)|PASSW(OR)?D|PASSPHRASE|CREDENTIAL", re.IGNORECASE)


def read_api_key(key_file: str | None) -> str | None:
    """The key in `key_file`, else in LUDIC_API_KEY, else in VLLM_API_KEY; None where none of them is given.

    One line break at the end of a file does not count. The messages never contain what was read.

    Raises:
        ValueError: the key is empty, of several lines, too long or not of visible ASCII; the file cannot be read, or others
            than its owner may read or write it. One line with the fix.
    """
    if key_file is not None:
        return _checked(_read(key_file), f"--api-key-file {key_file}")
    for name in KEY_VARIABLES:
        if name in os.environ:
            return _checked(os.environ[name], name)
    return None


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what is named like a secret (`*_KEY`, `*_TOKEN`, `*_SECRET`, `*_PASSWORD`, ...).

    For a child that works on a model's output or a stranger's data: what it does not know, it cannot give away.

    Example:
        >>> without_secrets({"PATH": "/bin", "LUDIC_API_KEY": "k", "HF_TOKEN": "t", "TOKENIZERS_PARALLELISM": "false"})
        {'PATH': '/bin', 'TOKENIZERS_PARALLELISM': 'false'}
    """
    return {name: value for name, value in environment.items() if not _SECRET.search(name)}


def _read(path: str) -> str:
    """The text of the key file; its permissions are those of what was opened, not of what the name meant before."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise ValueError(
                    f"--api-key-file {path} may be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}"
                )
            content = file.read(MAX_KEY_CHARS + 2)
    except OSError as error:
        raise ValueError(f"--api-key-file {path} cannot be read ({error.strerror}): give a file with the key") from None
    return content.decode("latin-1").removesuffix("\n").removesuffix("\r")


def _checked(key: str, source: str) -> str:
    if not key:
        raise ValueError(f"{source} is empty: put the server's key there, or leave it out for a server without one")
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"{source} holds more than {MAX_KEY_CHARS} characters, which is no key: one line with the key")
    if "\n" in key or "\r" in key:
        raise ValueError(f"{source} holds several lines: it must hold the key alone, on one line")
    if not _KEY.fullmatch(key):
        raise ValueError(f"{source} holds spaces or characters outside ASCII, which no HTTP header carries: one word")
    return key

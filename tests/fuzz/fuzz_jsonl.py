"""Any bytes as a JSON lines file: read, cut back to a step, mended and appended to (`ludic.storage.jsonl`).

    scripts/fuzz.sh 10 jsonl

`check` says what must hold of one input and needs no fuzzer: `tests/test_properties.py` draws inputs for it too.
"""

import logging
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
MARK: dict[str, object] = {"step": 7, "text": "\u202e\x1b[2J\ud800", "reward": 0.5}
SEEDS = (
    b'{"step": 1, "reward": 0.5}\n{"step": 2, "text": "\\ud800\\u001b[2J"}\n',
    b'{"step": 1}\n{"step": 2}\n{"step": 3, "tex',
    b'{"a": [NaN, Infinity, -Infinity, 1e999, 1' + b"0" * 30 + b"]}",
    b'\n\n{"step": true}\n',
    b"\xef\xbb\xbf{}\n",
    b'{\x00"\x00a\x00"\x00:\x001\x00}\x00\n\x00',
    b'{"a":' * 50 + b"1" + b"}" * 50 + b"\n",
    b"T\x00\x01\x05\x06\x1c\x00\x02\x09\x03\x12\x05\x06\x00",
    b"T\x00\x02\x05\x06\x19\x01\x1a\x06\x18",
)
TOKENS = (
    *(
        b'{"step": ',
        b"1",
        b"2",
        b'"reward": ',
        b"0.5",
        b"}",
        b"\n",
        b"\r\n",
        b'"',
        b", ",
        b": ",
        b"[",
        b"]",
        b"null",
        b"true",
    ),
    *(b"{", b"NaN", b"-Infinity", b"1e999", b"\\ud800", b"\\u", b"\\", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 2000),
    *(b'{"a":' * 500, b"}" * 500, b"9" * 5000, b'{"step": 2, "text": "x"}\n', b"\xe2\x80\xa8", b"\x00", b"\x7f"),
)
"""What a byte below 32 stands for in an input that begins with T: json's reader is C, so the fuzzer cannot see into it."""


def expand(data: bytes) -> bytes:
    """The file's bytes: the input itself, or what its tokens stand for."""
    if not data.startswith(b"T"):
        return data
    return b"".join(TOKENS[byte] if byte < len(TOKENS) else bytes([byte]) for byte in data[1:])


def check(data: bytes, folder: Path) -> None:
    """Raises AssertionError, or whatever the reader should not have raised, where a promise is broken."""
    from ludic.storage.jsonl import JsonlFile, encode_line

    path = folder / "lines.jsonl"
    whole = data[: data.rfind(b"\n") + 1]
    path.write_bytes(data)
    records = _read(path)
    assert path.read_bytes() == data, "reading changed the file"
    if records is not None:
        _check_cut(path, records)
        path.write_bytes(data)
    try:
        file = JsonlFile(path)
    except ValueError:
        assert path.read_bytes() == data, "a file that was refused was changed"
        return
    file.append(MARK)
    file.close()
    after = path.read_bytes()
    assert after.startswith(whole), "a whole line was lost"
    assert after.endswith(encode_line(MARK)), "the appended line is not the last"
    if records is not None:
        assert repr(_read(path)) == repr([*records, MARK]), "the lines before, and the new one"
    os.truncate(path, len(after) - 5)  # killed in the middle of the append
    JsonlFile(path).close()
    assert path.read_bytes() == after[: -len(encode_line(MARK))]


def _check_cut(path: Path, records: list[dict[str, object]]) -> None:
    """The lines of later steps are gone, and the others say the same."""
    from ludic.storage.jsonl import drop_steps_after

    kept = [record for record in records if not isinstance(at := record.get("step"), int) or at <= 1]
    assert drop_steps_after(path, 1) == len(records) - len(kept)
    assert _said(_read(path)) == _said(kept)
    assert drop_steps_after(path, 1) == 0


def _said(records: object) -> str:
    """What the records say; a number that JSON does not have may have become null."""
    return re.sub(r"-?\binf\b|\bnan\b", "None", repr(records))


def _read(path: Path) -> list[dict[str, object]] | None:
    """The records; None where the file is refused, which must say where."""
    from ludic.storage.jsonl import read_jsonl

    try:
        return read_jsonl(path)
    except ValueError as error:
        assert re.match(re.escape(str(path)) + r":\d+: ", str(error)) and "\n" not in str(error), str(error)
        return None


def main() -> None:
    import atheris

    from tests.fuzz import start

    with atheris.instrument_imports(include=["json", "ludic"]):
        import ludic.storage.jsonl  # noqa: F401

    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.gettempdir()) / "ludic-fuzz-jsonl"  # one for all runs: a fuzzer ends without cleaning up
    folder.mkdir(exist_ok=True)
    start(SEEDS, lambda data: check(expand(data), folder))


if __name__ == "__main__":
    main()

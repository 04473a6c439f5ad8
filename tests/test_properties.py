"""What holds of any bytes: the JSON lines reader, by the properties that its fuzzer checks too, and what is shown."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ludic.storage.inert import inert, inert_lines
from ludic.storage.jsonl import JsonlFile, encode_line, read_jsonl
from tests.fuzz import fuzz_jsonl

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.dictionaries(st.text(max_size=8), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
), max_size=4)  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@FEW
@given(st.lists(st.sampled_from(fuzz_jsonl.TOKENS) | st.binary(max_size=6), max_size=12).map(b"".join))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000 + b"\n")
@example(b'{"step": 5}\n{"a": 1e999, "b": NaN}\r\n{"step": 0}')
@example(b'{"a": 1' + b"0" * 5_000 + b"}")
@example(b'{"step": 2}\n' + b'{"a":' * 500 + b"-Infinity" + b"}" * 500 + b"\n")  # found by the fuzzer
@example(b'{"step": 5}\n\xff\xfe{\x00}\x00')
def test_any_bytes_are_read_or_refused_with_their_line_and_appending_to_them_loses_none(
    tmp_path: Path, data: bytes
) -> None:
    fuzz_jsonl.check(data, tmp_path)


@pytest.mark.parametrize("seed", fuzz_jsonl.SEEDS)
def test_the_fuzzers_seeds_for_json_lines_hold(tmp_path: Path, seed: bytes) -> None:
    fuzz_jsonl.check(fuzz_jsonl.expand(seed), tmp_path)


@FEW
@given(st.lists(WORDS, max_size=4))
def test_what_is_appended_is_read_back_and_is_harmless_to_print(
    tmp_path: Path, records: list[dict[str, object]]
) -> None:
    path = tmp_path / "lines.jsonl"
    path.unlink(missing_ok=True)
    file = JsonlFile(path)
    for record in records:
        file.append(record)
    file.close()
    assert read_jsonl(path) == records
    content = path.read_bytes()
    assert content.count(b"\n") == len(records)
    assert all(32 <= byte < 127 for byte in content.replace(b"\n", b""))


@FEW
@given(st.text(st.characters(codec=None), max_size=200), st.integers(1, 100))
def test_inert_text_is_printable_short_and_on_one_line(text: str, limit: int) -> None:
    shown = inert(text, limit)
    assert shown.isprintable() and len(shown) <= limit + len(" ...")
    assert shown == text[:limit] + " ..." * (len(text) > limit) or not text.isprintable() or "\\" in shown
    assert all(line.isprintable() for line in inert_lines(text, limit).split("\n"))
    assert encode_line({"text": text}).isascii()

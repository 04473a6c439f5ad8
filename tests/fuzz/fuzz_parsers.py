r"""Coverage-guided fuzzing of what reads a model's text in this process: parsers, numbers, the exact rules.

    pip install atheris; python tests/fuzz/fuzz_parsers.py -max_total_time=600 -max_len=1024 [libFuzzer's arguments]

The input's bytes are the completion: ASCII is itself, and each other byte is one of `PIECES`, so that a mutation of one
byte puts a whole command, a run of digits or a surrogate somewhere. A finding is an exception: something raised, an
invariant of `check_text` broke, or 4 KB took more than a second. `tests/test_parsers.py` tries `check_text` on drawn
inputs, and keeps what was found.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

LIMIT_S = 1.0
"""CPU time for all properties of one input."""
SEEDS = (
    r"so \boxed{\frac{36}{2}} eggs, $-1,234.50, 18\% and 2 1/2",
    r"\boxed 5. In \boxed{x = 1.8 \times 10^{1}\text{ cm}^2}",
    r"\fbox{\$1{,}000 million dollars per day}",
    r"**$\(\displaystyle{17\frac{2}{2}}\)$**",
    r"\text{Total}: 18 hundred ^\circ C = 1e3 = 36/2",
)
PIECES = (
    "\\boxed{", "\\fbox{", "\\boxed ", "\\frac{", "}{", "\\dfrac12", "\\text{", "\\mathrm{ cm}", "\\left(", "\\right)",
    "\\{", "\\}", "\\sqrt{", "\\sqrt[3]{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\times 10^{", "^{", "_{", "\\pi",
    "\\infty", "\\cup", "\\pm ", "\\sum_{k=1}^{", "\\int_0^1 ", "\\binom{", "\\lim_{x \\to 0}", "\\sin ", "\\log_{",
    "\\overline{", "\\le ", "\\neq ", "\\circ", "\\$", "\\%", "\\,", "\\!", "{,}", "\\displaystyle", "\\(", "\\)",
    "\\[", "\\]", "$$", "**", "1,000", "000", "18", "36/2", "17 2/2", "1e1001", "e-9", "9" * 40, "1" * 300,
    " million", " hundred", " percent", " dollars", " per day", "USD ", "x = ", "Total: ", " or ", "((((", "))))",
    "{{{{", "}}}}", "\u2212", "\u20ac", "\u00a0", "\u2009", "\u0661\u0668", "\uff11", "\u00b2", "\u0301", "\u202e",
    "\u2028", "\ud800", "\udfff", "\U0001d7d9", "\u00d7", "\u2264", "\u00b0",
)  # fmt: skip


def decode(data: bytes) -> str:
    """The text that the fuzzer's bytes stand for."""
    return "".join(chr(byte) if byte < 128 else PIECES[(byte - 128) % len(PIECES)] for byte in data)


def check_text(text: str) -> None:
    """Raises where a promise about reading `text` is broken."""
    from environments.gsm8k import _last_digits
    from ludic.task.grading import _decide
    from ludic.task.numbers import clean_answer, read_number, same_number
    from ludic.task.parsers import boxed_parser, last_number_parser

    start = time.thread_time()
    boxed, last = boxed_parser(text), last_number_parser(text)
    if boxed.answer is not None:
        assert last == boxed
        assert boxed.answer
        assert boxed.answer in text
        assert boxed.answer == boxed.answer.strip()
    digits = _last_digits(text)
    assert not digits or (digits.isascii() and digits.isdigit() and digits in text)
    for answer in (text, last.answer or ""):
        cleaned = clean_answer(answer)
        assert len(cleaned) <= 5 * len(answer)  # `½` is spelled out as ` 1/2`, and a superscript as `^{2}`.
        number = read_number(cleaned)
        if number is not None and number.value is not None:
            assert same_number(number, number)
            again = read_number(clean_answer(str(number.value)))
            assert again is None or again.value == number.value  # None: beyond the longest answer.
        verdict = _decide(answer, answer)
        if answer.strip() and len(answer.strip()) <= 2_000:
            assert getattr(verdict, "matched", False), "an answer does not match itself"
        for target in ("18", "1,080", r"\frac{1}{2}", "x + 1"):
            _decide(answer, target)
            _decide(target, answer)
    seconds = time.thread_time() - start
    assert seconds < LIMIT_S or len(text) > 4_096, f"{len(text)} characters took {seconds:.2f} s"


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["ludic", "environments"]):
        import environments.gsm8k  # noqa: F401
        import ludic.task.grading  # noqa: F401

    from tests.fuzz import start

    start([seed.encode() for seed in SEEDS], lambda data: check_text(decode(data)))


if __name__ == "__main__":
    main()

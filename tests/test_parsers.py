import re
import time

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT
from ludic.task.parsers import boxed_parser, closing_brace, last_number_parser
from tests.fuzz.fuzz_parsers import SEEDS, check_text, decode


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{18}", "18"),
        (r"so \boxed{ 18 } eggs", "18"),
        (r"\boxed{17}, no, \boxed{18}", "18"),
        (r"\boxed{\frac{36}{2}}", r"\frac{36}{2}"),
        (r"\boxed{\text{a {b} c}}", r"\text{a {b} c}"),
        (r"\boxed {18}", "18"),
        ("\\boxed\n{18}", "18"),
        (r"\fbox{18}", "18"),
        (r"\boxed{\fbox{18} eggs}", "18"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1\}2}", r"1\}2"),
        (r"\boxed{18\\} and }", r"18\\"),
        (r"\boxed{18} and more text {", "18"),
        (r"\boxed 18", "18"),
        (r"$\boxed 18$.", "18"),
        (r"\(\boxed 18\)", "18"),
        (r"\boxed 1,000.", "1,000"),
        (r"\boxed\frac{1}{2} is it", r"\frac{1}{2}"),
        (r"\boxed x", "x"),
        (r"\boxed{18}. As I wrote in \boxed.", "18"),
        (r"\boxed{18}, inside \boxed as asked", "18"),
        (r"\boxed{-}", "-"),
        (r"\boxed{31\ }", "31"),
        (r"\boxed{31\\ }", r"31\\"),
    ],
)
def test_the_last_box_is_the_answer(text: str, answer: str) -> None:
    assert boxed_parser(text).answer == answer


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no \\boxed{...} in the text"),
        ("18", "no \\boxed{...} in the text"),
        (r"\boxedanswer{18}", "no \\boxed{...} in the text"),
        (r"boxed{18}", "no \\boxed{...} in the text"),
        (r"\boxed", "no \\boxed{...} in the text"),
        (r"\boxed{18", "the last box is not closed"),
        (r"\boxed{18\}", "the last box is not closed"),
        (r"\boxed{17} then \boxed{\frac{36}{2}", "the last box is not closed"),
        (r"\boxed{}", "the last box is empty"),
        (r"\boxed{...}", "the last box is empty"),
        (r"\boxed{17} then \boxed{} and \boxed{18", "the last box is not closed"),
    ],
)
def test_a_missing_unclosed_or_empty_box_is_an_error(text: str, error: str) -> None:
    assert boxed_parser(text).error == error


@pytest.mark.parametrize(
    "mention",
    [r"\boxed{...}", r"\boxed{}", r"\boxed{ }", r"\fbox{…}", r"\boxed{\ldots}", r"\boxed{\dots\,}", r"\boxed{___}",
     r"\boxed{?}",
     r"\boxed{\text{}}", r"\boxed{\text{...}}", r"\boxed{answer}", r"\boxed{\text{your answer}}",
     r"\boxed{<your final answer>}",
     r"\boxed{\text{final answer here}}", r"\boxed", r"\boxed{} and \boxed{...}",
     r"\boxed {\quad}", DEFAULT_SYSTEM_PROMPT],
)  # fmt: skip
def test_a_later_box_without_an_answer_does_not_decide_against_an_earlier_one(mention: str) -> None:
    assert boxed_parser(rf"So \boxed{{18}}. I wrote it inside {mention}, as asked.").answer == "18"
    assert boxed_parser(rf"So {mention}, 7.").answer is None
    assert last_number_parser(rf"So {mention}, 7.").answer == "7"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (r"<think>So \boxed{17}.</think> It is 18.", None, "18"),
        (r"<think>So \boxed{17}.</think> It is \boxed{18}.", "18", "18"),
        (r"So \boxed{17}.</think> It is 18.", None, "18"),  # The template wrote `<think>`.
        (r"<think>a</think><think>\boxed{17}</think>\n\n18", None, "18"),
        (r"<thinking>\boxed{17}</thinking> 18", None, "18"),
        (r"[THINK]\boxed{17}[/THINK] 18", None, "18"),
        (r"<THINK>\boxed{17}</THINK> I do not know.", None, None),
        ("<think>So \\boxed{17}.</think>\n\n", "17", "17"),
        (r"<think>So \boxed{17}.</think>", "17", "17"),
        (r"<think>So \boxed{17}. Wait, 18", "17", "17"),
        (r"\boxed{17} <think>hm</think>", "17", "17"),
    ],
)
def test_a_box_in_the_thinking_is_the_answer_only_if_nothing_follows(
    text: str, strict: str | None, flexible: str | None
) -> None:
    assert boxed_parser(text).answer == strict
    assert last_number_parser(text).answer == flexible


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 16 eggs and sells 9.", "9"),
        ("It is $1,234.50.", "1,234.50"),
        (r"It is \$18", "18"),
        ("1{,}000", "1{,}000"),
        ("1,00", "00"),
        ("1,2,3", "3"),
        ("-5", "-5"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5", "-5"),
        ("\u22125", "-5"),
        ("+5", "5"),
        ("20-5", "5"),
        ("20 - 5", "5"),
        (".5", ".5"),
        ("3.", "3"),
        ("3.14.", "3.14"),
        ("18%", "18%"),
        (r"18\%", r"18\%"),
        ("3/4 of it", "3/4"),
        ("2 1/2", "2 1/2"),
        (r"so -\dfrac{3}{4}", r"-\dfrac{3}{4}"),
        (r"2\frac{1}{2}", r"2\frac{1}{2}"),
        ("1e3", "1e3"),
        ("10/2=5", "5"),
        ("**18**", "18"),
        (r"\boxed{17} or 18", "17"),
        (r"\boxed{17", "17"),
        ("room A1", "1"),
    ],
)
def test_without_a_box_the_last_number_is_the_answer(text: str, answer: str) -> None:
    assert last_number_parser(text).answer == answer


@pytest.mark.parametrize("text", ["", "eighteen", "\u0661\u0668", "\u2460", "\u00b2", "\u2167"])
def test_words_and_digits_of_other_scripts_are_no_numbers(text: str) -> None:
    assert last_number_parser(text).error == "no box and no number in the text"


_PIECES = st.lists(
    st.sampled_from(
        ["\\boxed", "\\fbox", "{", "}", "\\", " ", "1", ",", ".", "-", "/", "$", "%", "e", "\\frac", "\x00"]
    )
    | st.text(st.characters(), max_size=3)
).map("".join)


@given(_PIECES)
@example("\ud800\\boxed{\udfff\x00}")
def test_no_text_makes_a_parser_raise(text: str) -> None:
    for parser in (boxed_parser, last_number_parser):
        answer = parser(text).answer
        assert answer is None or answer


@given(st.binary(max_size=80).map(decode))
@example(SEEDS[0])
@example(SEEDS[1])
@example(SEEDS[2])
@example(SEEDS[3])
@example(SEEDS[4])
def test_the_promises_about_reading_a_text_hold(text: str) -> None:
    check_text(text)


_BALANCED = st.recursive(
    st.text(st.characters(exclude_characters="{}\\")),
    lambda inner: st.lists(inner | st.sampled_from(["\\{", "\\}", "\\\\ "])).map(
        lambda parts: "{" + "".join(parts) + "}"
    ),
)


@given(before=st.text(), content=_BALANCED, after=st.text(st.characters(exclude_characters="\\")))
def test_whatever_is_boxed_comes_back(before: str, content: str, after: str) -> None:
    assume("</think" not in after.lower() and not re.fullmatch(r"[\s.…_?~<>\[\]]*", content))
    result = boxed_parser(before.rstrip("\\") + " \\boxed{" + content + "}" + after)
    if content.strip():
        assert result.answer == content.strip()
    else:
        assert result.error == "the last box is empty"


@given(_PIECES)
def test_the_closing_brace_is_the_first_place_where_the_depth_is_back_to_nothing(text: str) -> None:
    end = closing_brace("{" + text, 0)
    plain = ("{" + text).replace("\\\\", "..").replace("\\{", "..").replace("\\}", "..")
    depths = [plain[: i + 1].count("{") - plain[: i + 1].count("}") for i in range(len(plain))]
    assert end == (depths.index(0) if 0 in depths else None)


@pytest.mark.parametrize(
    "unit",
    ["{", "}", "{}", "\\boxed{", "\\boxed", "\\boxed ", "\\boxed x{", "\\frac{", "\\frac{1}{", "\\", "1", "1 ", "1,",
     "1,000", "1/", "1e", "-", "$", ".", "1.", "1 1", " ", "^{", "^", "m^{2", "\\boxed{}", "\\boxed{...", "1 000",
     "½", "</think>",
     "1.\\overline{", "1.(1", "1 x 10^", "1\u200b", "1 million", "x_{", "\\boxed{\\text{ "],
)  # fmt: skip
def test_time_grows_linearly_on_hostile_text(unit: str) -> None:
    def seconds(num_chars: int) -> float:
        text = "\\boxed" + unit * (num_chars // len(unit))
        best = float("inf")
        for _ in range(3):
            start = time.thread_time()
            last_number_parser(text)
            best = min(best, time.thread_time() - start)
        return best

    # Eight times the text: a quadratic scan would take 64 times as long. The constant is for what is too quick to time.
    assert seconds(160_000) < 24 * seconds(20_000) + 0.01

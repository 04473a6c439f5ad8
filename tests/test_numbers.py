"""What is the same number, and what is not: the rules of `ludic.task.grading` that take no algebra, and both who read numbers."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ludic.task.grading import Grader, Verdict
from ludic.task.numbers import clean_answer, read_number
from ludic.task.parsers import last_number_parser


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    """One that must not start a worker."""

    def refuse(*_: object) -> None:
        raise RuntimeError("a worker was started")

    made = Grader()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ludic.task.grading_pool._Process.__init__", refuse)
        yield made
    made.close()


def matched(grader: Grader, prediction: str, target: str) -> bool:
    verdict = grader.match_sync(prediction, target)
    assert verdict.failure is None
    return verdict.matched


@pytest.mark.parametrize(
    ("prediction", "target", "same"),
    [
        (r"60\%", "60", True),
        ("60%", "60.0", True),
        ("60 %", "60", True),
        (r"60\text{ percent}", "60", True),
        ("60 per cent", "60", True),
        ("60 pct", "60", True),
        ("60 percentage points", "60", True),
        ("-12.5%", "-12.5", True),
        (r"\frac{1}{2}\%", "0.5", True),
        ("60%", "0.6", True),
        (r"x = 60\%", "60", True),
        ("60% of the students", "60", True),
        ("1,200%", "1200", True),
        ("1,200%", "12", True),
        ("60%", r"60\%", True),
        (r"60\%", "60 percent", True),
        ("60%", "6000%", False),
        ("60%", "0.6%", False),
        ("60%", "6", False),
        ("60%", "6000", False),
        ("60%", "0.006", False),
        ("60%", "-60", False),
        ("60%", "60 dollars", False),
        ("60%", "$60", False),
    ],
)
def test_a_percent_sign_on_exactly_one_side_may_count_or_not(
    grader: Grader, prediction: str, target: str, same: bool
) -> None:
    assert matched(grader, prediction, target) == matched(grader, target, prediction) == same


@pytest.mark.parametrize(
    ("prediction", "target", "same"),
    [
        (r"12\text{ L}", "12", True),
        (r"12\,\mathrm{L}", "12 liters", True),
        ("12L", "12", True),
        ("12 g", "12", True),
        ("12ml", "12 mL", True),
        ("12ML", "12 ml", True),
        ("5kg", "5 kilograms", True),
        ("5 KG", "5", True),
        ("12 m²", "12", True),
        ("12m²", "12 square meters", True),
        (r"12\text{ m}^2", "12 m^{2}", True),
        (r"12\text{ m}^{2}", r"12~\mathrm{m^2}", True),
        ("12 m2", "12 sq. m", True),
        ("12 meters squared", "12 m^2", True),
        ("12 cm³", "12 cubic centimeters", True),
        ("12 sq. ft.", "12 square feet", True),
        ("60 km/h", "60 kilometers per hour", True),
        ("60 mph", "60 miles an hour", True),
        ("9.8 m/s^2", "9.8 meters per second squared", True),
        ("3 g/cm^3", "3", True),
        ("3 N·m", "3", True),
        ("8 fl oz", "8 fluid ounces", True),
        ("3 km", "3000 m", True),
        ("1 hour", "60 minutes", True),
        ("100 cents", "$1", True),
        ("5 dollars per day", "$5 a day", True),
        ("18 apples per day", "18 apples/day", True),
        ("18 years old", "18 years", True),
        ("6 feet tall", "6 ft", True),
        ("18 kids left", "18 kids", True),
        ("18 left", "18", True),
        ("18 in total", "18 eggs", True),
        ("1 apple", "1", True),
        ("18 boxes", "18", True),
        ("18 people", "18", True),
        ("18 red marbles", "18", True),
        ("18 pieces of cake", "18 pieces", True),
        ("18 U.S. dollars", "$18", True),
        ("£5", "5 pounds", True),
        ("6 pm", "6 p.m.", True),
        ("8 quarters", "8", True),
        ("3 km", "3 m", False),
        ("3 km", "3 miles", False),
        ("3 km", "3 km/h", False),
        ("12 m²", "12 m", False),
        ("12 m²", "12 m³", False),
        ("12 l", "12 ml", False),
        ("5 kg", "5 pounds", False),
        ("5 MW", "5 mW", False),
        ("6am", "6 pm", False),
        ("6 a.m.", "6pm", False),
        ("18 cents", "$18", False),
        ("$18", "18 €", False),
        ("18 apples", "18 oranges", False),
        ("18 apples per day", "18 apples per week", False),
        ("2 thirds", "2", False),
        ("3 quarters", "3", False),
        ("5 halves", "5", False),
        ("2 fifths", "2", False),
        ("3 tens", "3", False),
        ("2 hundreds", "2", False),
        ("4 squared", "4", False),
        ("4 cubed", "4", False),
        ("5 gross", "5", False),
        ("2 score", "2", False),
        ("3 pi", "3", False),
        ("18 th", "18", False),
        ("5 below zero", "5", False),
        ("5 less than x", "5", False),
        ("5 and a half", "5", False),
        ("5 foo", "5", False),
        ("5 zz", "5", False),
    ],
)
def test_a_unit_is_known_by_its_dimensions_and_what_changes_the_value_is_none(
    grader: Grader, prediction: str, target: str, same: bool
) -> None:
    assert matched(grader, prediction, target) == same
    if read_number(clean_answer(prediction)) is not None:
        assert matched(grader, target, prediction) == same


@pytest.mark.parametrize("degrees", [r"60^\circ", r"60^{\circ}", r"60 ^ \circ", "60°", "60º", "60 degrees", r"60\text{ degrees}",
                                     "60 deg", r"60\degree", r"$60^{\circ}$"])  # fmt: skip
def test_all_ways_to_write_degrees_are_one_answer(grader: Grader, degrees: str) -> None:
    for other in (r"60^\circ", r"60^{\circ}", "60 degrees", "60", "60°C", r"60^\circ\text{F}"):
        assert matched(grader, degrees, other)
    for other in ("61°", "60 radians", "6°"):
        assert not matched(grader, degrees, other)
    assert matched(grader, "20°C", r"20^{\circ}\text{C}") and matched(grader, "20 °C", "20 degrees Celsius")
    assert not matched(grader, "20°C", "20°F")


@pytest.mark.parametrize(
    ("prediction", "target", "same"),
    [
        ("\u20135", "-5", True),
        ("\uff0d5", "-5", True),
        ("\u20115", "-5", True),
        ("\uff11\uff18", "18", True),
        ("\uff11\uff0c\uff10\uff18\uff10", "1080", True),
        ("\uff04\uff11\uff18\uff0e\uff15", "18.5", True),
        ("60\uff05", "60", True),
        ("\U0001d7cf\U0001d7d6", "18", True),
        ("½", "0.5", True),
        ("2½", "2.5", True),
        ("2 ½ cups", "5/2", True),
        ("-2¾", "-2.75", True),
        ("⅔", "2/3", True),
        ("\u00b9\u2044\u2082", "0.5", True),
        ("1\u20442", "0.5", True),
        ("3\u200b000", "3000", True),
        ("\ufeff18\u200d", "18", True),
        ("1\u00a0000", "1000", True),
        ("1\u202f234\u2009567", "1234567", True),
        ("1.8 \u00d7 10⁵", "180000", True),
        ("1.8 x 10^5", "180000", True),
        ("5 · 10⁻³", "0.005", True),
        ("48 m²", "48", True),
        ("\u0661\u0668", "18", False),
        ("①", "1", False),
        ("\u202e81", "18", False),
        ("\u202e81", "81", False),
        ("½", "2", False),
        ("2½", "21/2", False),
        ("10\u201315", "-5", False),
    ],
)
def test_characters_that_stand_for_digits_signs_and_fractions_are_read(
    grader: Grader, prediction: str, target: str, same: bool
) -> None:
    number = read_number(clean_answer(prediction))
    if number is None:  # Algebra would be asked, and say no.
        assert not same
    else:
        assert matched(grader, prediction, target) == matched(grader, target, prediction) == same


@pytest.mark.parametrize(
    ("prediction", "target", "same"),
    [
        (r"0.\overline{6}", "2/3", True),
        (r"0.\bar{3}", r"\frac{1}{3}", True),
        (r"0.\bar3", "1/3", True),
        (r"0.\dot{6}", "2/3", True),
        ("0.(142857)", "1/7", True),
        (r"0.1\overline{6}", "1/6", True),
        (r"-12.\overline{36}", "-136/11", True),
        (r"33.\overline{3}\%", r"\frac{100}{3}", True),
        (r"0.\overline{9}", "1", True),
        (r"0.\overline{6}", "0.6", False),
        (r"0.\overline{6}", "0.667", False),
        (r"0.6\overline{1}", "0.61", False),
    ],
)
def test_a_repeating_decimal_is_its_fraction(grader: Grader, prediction: str, target: str, same: bool) -> None:
    assert matched(grader, prediction, target) == same


@pytest.mark.parametrize(
    ("prediction", "same"),
    [(r"\approx 33", True), ("≈33", True), (r"x \approx 33", True), ("x ≈ 33.0", True), (r"\approx \$33", True),
     ("~33", True),
     (r"\sim 33", True), (r"100/3 \approx 33", True), (r"x = 100/3 \approx 33.0", True), ("about 33", True),
     ("roughly 33 km", True),
     ("approximately $33$", True), (r"\approx 33\%", True), (r"33 \approx 34", False), (r"\approx 34", False),
     ("33 ≈ 32.9", False),
     ("≈ 33 ≈ 40", False), ("around x", False)],
)  # fmt: skip
def test_what_is_about_a_number_says_that_number(grader: Grader, prediction: str, same: bool) -> None:
    assert grader.match_sync(prediction, "33") == Verdict(matched=same)


@pytest.mark.parametrize(
    ("answer", "clean"),
    [
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("\\begin{pmatrix}1\\\\\n2\\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}"),
        (r"1\\,2", r"1\\,2"),
        (r"1\\\ 2", r"1\\ 2"),
        (r"1\\\text{a}", r"1\\ a"),
        (r"1\\!", r"1\\!"),
        ("31\\ ", "31"),
        ("31\\", "31"),
        (r"31\\", r"31\\"),
        (r"$31\ $", "31"),
        (r"58,\! 731", "58,731"),
        (r"58 ,\!731", "58 ,731"),
        (r"58{,} 731", "58,731"),
        (r"58{\,}731", "58 731"),
        (r"58\thinspace 731", "58 731"),
        (r"x\quad y", "x y"),
        (r"\quadratic", r"\quadratic"),
        (r"\$18", r"\$18"),
    ],
)
def test_cleaning_knows_a_row_break_from_a_space(answer: str, clean: str) -> None:
    assert clean_answer(answer) == clean


WRITINGS = ["18", "1,080", "1 000", "1\u00a0000", "1\u202f234\u2009567", r"1\,000", "1\\ 000", "1~000", "1{,}000",
            r"1,\!000",
            r"1,\! 000", r"1\thinspace 000", "-5", "\u20135", "\u22125", "\uff11\uff18", r"1.8 \times 10^{5}",
            "1.8 \u00d7 10⁵",
            "1.8 x 10^5", r"1.8\cdot10^{-5}", "1.8e5", "½", "2½", "3 ¾", "\u00b9\u2044\u2082", "2 1/2", "1 / 2",
            r"\frac{1}{2}", r"\frac12",
            r"\frac{1}2", r"2\frac{1}{2}", r"0.\overline{6}", r"0.\bar3", "0.(6)", r"60\%", "60\uff05", "60 percent",
            "1.5 million",
            "2 hundred thousand", ".5", "\U0001d7cf\U0001d7d6", "3\u200b000"]  # fmt: skip


@pytest.mark.parametrize(
    "frame", ["It is {}.", "so {} apples", "= {} m^2", "$x = {}$", "**{}**", "7 eggs, {} more", "{} cm2", "${}"]
)
@pytest.mark.parametrize("writing", WRITINGS)
def test_what_the_grader_reads_as_a_number_the_parser_finds_whole(writing: str, frame: str) -> None:
    expected = read_number(clean_answer(writing))
    found = last_number_parser(frame.format(writing)).answer
    assert expected is not None and found is not None
    given = read_number(clean_answer(found))
    assert given is not None
    assert (given.value, given.percent) == (expected.value, expected.percent)


@given(
    st.decimals(-(10**9), 10**9, places=3), st.sampled_from([",", " ", "\u00a0", r"\,", "{,}", r",\!", "\u2009", "~"])
)
def test_any_decimal_with_any_separator_is_found_and_read(value: object, separator: str) -> None:
    written = f"{value:,f}".replace(",", separator)
    found = last_number_parser(f"That makes {written} in all.").answer
    assert found is not None
    number = read_number(clean_answer(found))
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [("48 m^2", "48"), ("48 m²", "48"), ("48 m2.", "48"), (r"48\text{ cm}^{2}", "48"), ("9.8 m/s^2", "9.8"),
     ("48 m^{-2}", "48"),
     ("5, since x_1", "5"), ("7 is x_{12}", "7"), (r"2^{10}", "2^{10}"), ("10^5", "10^5"), ("5⁴", "5⁴"),
     (r"60^\circ", "60"),
     ("_18_", "18"), ("room A1", "1"), ("1 2 300", "300"), ("In 2020 100 people", "100"), ("10\u201315", "15"),
     ("2,5 or 1,00", "00")],
)  # fmt: skip
def test_the_exponent_of_a_unit_and_an_index_are_not_the_last_number(text: str, answer: str) -> None:
    assert last_number_parser(text).answer == answer

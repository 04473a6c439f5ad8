r"""Read the number that a short answer is, exactly: `$1,234.50`, `\frac{36}{2}`, `x = 18`, `18 apples per day`.

The rules are listed in `ludic.grading`, which uses them. They are exact (Fraction, never float) and bounded: no answer
within `MAX_ANSWER_CHARS` costs more than arithmetic on a few thousand digits. Algebra is left to math-verify.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from ludic.parsers import closing_brace

MAX_ANSWER_CHARS = 2_000
"""A longer prediction or target (after stripping) is refused at once, as `too_long`."""
MAX_EXPONENT = 1_000
"""`1e1001` is a number that equals nothing but itself, written the same way: it is never multiplied out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """What `read_number` reads. Percent and magnitude are in the value, a currency sign is nowhere.

    Example:
        >>> read_number("x = 1.5 thousand dollars")
        Number(value=Fraction(1500, 1), name='x', unit='dollars')
    """

    value: Fraction | None
    """None: a well-formed number beyond `MAX_EXPONENT`."""
    name: str = ""
    """The word before the number's `=` or `:`."""
    unit: str = ""


_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;: ]|\\q?quad(?![A-Za-z])|[~\u00a0\u2009\u202f]")
_DIGIT_PAIR_FRACTION = re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])")
_WRAPPINGS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_BRACED = re.compile(r"(?:\\boxed|\\fbox|\\displaystyle)?\s*\{")
_NAME = re.compile(r"(?P<name>[A-Za-z\\][A-Za-z\\ ]*(?:_\{?[A-Za-z0-9]+\}?)?) ?[=:] ?(?P<rest>[^=].*)", re.DOTALL)

_DECIMAL = r"(?:(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_DECIMAL_ONLY = re.compile(_DECIMAL)
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\ ?(?:(?:USD|(?:US)?\\?[$€£¥])\ ?)?(?P<inner_sign>[-+]?)
    (?: (?:(?P<whole>[0-9]+)\ ?)?\\[dtc]?frac\ ?\{{\ ?(?P<top>-?{_DECIMAL})\ ?\}}\ ?\{{\ ?(?P<bottom>-?{_DECIMAL})\ ?\}}
      | (?P<whole2>[0-9]+)\ (?P<top2>[1-9][0-9]*)\ ?/\ ?(?P<bottom2>[0-9]+)
      | (?P<top3>{_DECIMAL})\ ?/\ ?(?P<bottom3>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})
        (?: [eE](?P<exponent>[-+]?[0-9]+)
          | \ ?(?:\\times|\\cdot|\u00d7|\*)\ ?10\ ?\^\ ?\{{?(?P<exponent2>[-+]?[0-9]+)\}}?
        )?
    )
    (?P<tail>[^0-9.,].*)?
    """,
    re.VERBOSE | re.DOTALL,
)
_PERCENT = re.compile(r" ?(?:\\?%|(?:percent|per cent|pct)(?![A-Za-z]))(?P<rest>.*)", re.DOTALL | re.IGNORECASE)
_CURRENCY_BEHIND = re.compile(r" ?\\?[$€£¥]")
_MAGNITUDE = re.compile(r" ?(?P<word>hundred|thousand|million|billion|trillion)(?![A-Za-z])", re.IGNORECASE)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_UNIT = re.compile(r" ?(?:\^ ?\{? ?\\circ ?\}?|°) ?[CF]?| [A-Za-z]{2}[A-Za-z /.'()-]*(?:\^ ?\{?[23]\}?|[²³])?")
_NO_UNIT = re.compile(  # Words that go on counting, or take back what was said.
    r"\b(?:or|plus|minus|not|to|half|quarter|third|over|mod|choose|is|zero|one|two|three|four|five|six|seven|eight|nine|"
    r"ten|eleven|twelve|[a-z]+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|"
    r"billion|trillion|tenths?|hundredths?|thousandths?|percent|squared|cubed|pi)\b",
    re.IGNORECASE,
)
_FIRST_TOKEN = re.compile(r"[-+]?(?:\\?[$€£¥] ?)?(?P<digits>[0-9][0-9.,]*)")
_TWO_NUMBERS = re.compile(r"[0-9.] +[0-9.]")


def clean_answer(answer: str) -> str:
    """`answer` without wrappings, text commands and typographic spaces; one space for any white space.

    Beyond `MAX_ANSWER_CHARS` it comes back as it is.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    answer = _TEXT.sub(r" \1 ", answer.replace("\u2212", "-").replace("{,}", ",").replace(r"\!", ""))
    answer = " ".join(_SPACING.sub(" ", answer).split())
    for _ in range(8):
        before = answer
        if answer[-1:] in tuple(".,;:"):
            answer = answer[:-1].rstrip()
        for left, right in _WRAPPINGS:
            inner = answer[len(left) : len(answer) - len(right)]
            # `$5 + $13$` is not one pair, `$\$18$` is: escaped signs do not count.
            plain = inner.replace(r"\$", "")
            if (
                answer.startswith(left)
                and answer.endswith(right)
                and len(answer) > len(left + right)
                and not plain.endswith("\\")
                and left not in plain
                and right not in plain
            ):
                answer = inner.strip()
        braced = _BRACED.match(answer)
        if braced and closing_brace(answer, braced.end() - 1) == len(answer) - 1:
            answer = answer[braced.end() : -1].strip()
        if answer == before:
            break
    return answer


def read_number(answer: str) -> Number | None:
    """The number that a cleaned answer of at most `MAX_ANSWER_CHARS` is, or None."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    name = ""
    if named := _NAME.fullmatch(answer):
        name, answer = named["name"].strip(), named["rest"]
    match = _NUMBER.fullmatch(_DIGIT_PAIR_FRACTION.sub(r"\\frac{\1}{\2}", answer))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    scaled = _read_tail(match["tail"] or "")
    value = _exact_value(match)
    if scaled is None or value is None:
        return None
    scale, unit = scaled
    if value == "beyond":
        return Number(value=None, name=name, unit=unit)
    negative = "-" in (match["sign"], match["inner_sign"])
    return Number(value=-value * scale if negative else value * scale, name=name, unit=unit)


def _exact_value(match: re.Match[str]) -> Fraction | Literal["beyond"] | None:
    def fraction(text: str) -> Fraction:
        return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))

    if match["decimal"]:
        mantissa = fraction(match["decimal"])
        exponent = match["exponent"] or match["exponent2"] or "0"
        if mantissa == 0:
            return mantissa
        # Leading zeros aside, more digits than the limit has is too much; int() must not see a thousand of them.
        if len(exponent.lstrip("+-0")) > len(str(MAX_EXPONENT)) or abs(int(exponent)) > MAX_EXPONENT:
            return "beyond"
        return mantissa * Fraction(10) ** int(exponent)
    top = fraction(match["top"] or match["top2"] or match["top3"])
    bottom = fraction(match["bottom"] or match["bottom2"] or match["bottom3"])
    return None if bottom == 0 else fraction(match["whole"] or match["whole2"] or "0") + top / bottom


def _read_tail(tail: str) -> tuple[Fraction, str] | None:
    """(factor, unit) that the text behind a number means, or None where it is neither a magnitude nor a unit."""
    scale = Fraction(1)
    while magnitude := _MAGNITUDE.match(tail):
        scale *= 10 ** _MAGNITUDES[magnitude["word"].lower()]
        tail = tail[magnitude.end() :]
    if percent := _PERCENT.fullmatch(tail):
        scale, tail = scale / 100, percent["rest"]
    if currency := _CURRENCY_BEHIND.match(tail):
        tail = tail[currency.end() :]
    if not tail:
        return scale, ""
    if _UNIT.fullmatch(tail) is None or _NO_UNIT.search(tail):
        return None
    return scale, tail.strip()


def same_number(a: Number, b: Number) -> bool:
    """Equal values, and no name or unit that contradicts the other's."""

    def agree(first: str, second: str) -> bool:
        words = [re.sub(r"s\b", "", text.casefold()).replace(" ", "") for text in (first, second)]
        return not first or not second or words[0] == words[1]

    return a.value is not None and a.value == b.value and agree(a.name, b.name) and agree(a.unit, b.unit)


def is_broken_number(side: str) -> bool:
    """Whether `side` begins with a number whose separators make no sense, or has two numbers side by side."""
    token = _FIRST_TOKEN.match(side)
    return (token is not None and not _DECIMAL_ONLY.fullmatch(token["digits"])) or bool(_TWO_NUMBERS.search(side))

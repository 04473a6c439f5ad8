r"""Read the number that a short answer is, exactly: `$1,234.50`, `\frac{36}{2}`, `x = 18`, `18 apples per day`.

The rules are listed in `ludic.task.grading`, which uses them. They are exact (Fraction, never float) and bounded: no answer
within `MAX_ANSWER_CHARS` costs more than arithmetic on a few thousand digits. Algebra is left to math-verify.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ludic.task.parsers import closing_brace
from ludic.task.typography import spelled_out
from ludic.task.units import NO_UNIT, Unit, agree, read_unit

MAX_ANSWER_CHARS = 2_000
"""A longer prediction or target (after stripping) is refused at once, as `too_long`."""
MAX_EXPONENT = 1_000
"""`1e1001` is a number that equals nothing but itself, written the same way: it is never multiplied out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """What `read_number` reads. Percent and magnitude are in the value.

    Example:
        >>> read_number("x = 150%")
        Number(value=Fraction(3, 2), name='x', unit=Unit(factor=Fraction(1, 1), dimensions=()), percent=True)
    """

    value: Fraction | None
    """None: a well-formed number beyond `MAX_EXPONENT`."""
    name: str = ""
    """The word before the number's `=` or `:`."""
    unit: Unit = NO_UNIT
    """A currency sign is one, unless another unit is behind the number."""
    percent: bool = False


# A row break, `\\\\`, is matched first everywhere, so that its second backslash begins no other command.
_ROW_BREAK = r"(?P<row>\\\\)"
_SPACING = re.compile(
    rf"{_ROW_BREAK}|(?P<comma>\s*+\{{,\}}\s*+)|(?P<none>\s*+\\!\s*+|\s*+\\negthinspace(?![A-Za-z])\s*+)"
    r"|\\[,;:>\s]|\\(?:q?quad|thinspace|enspace|space)(?![A-Za-z])|~|\{\s*+(?:\\[,;:!\s]|~)?+\s*+\}(?=[0-9]{3})"
)
_TEXT = re.compile(
    rf"{_ROW_BREAK}|\\(?:text|textbf|textrm|textit|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname|unit)\*?"
    r"\s*\{([^{}]*)\}"
)
_LONE_BACKSLASH = re.compile(r"(?<!\\)((?:\\\\)*+)\\\Z")
_BARE_FRACTION = re.compile(r"\\[dtc]?frac ?([0-9]|\{[^{}]*\}) ?([0-9]|\{[^{}]*\})")
_WRAPPINGS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_BRACED = re.compile(r"(?:\\boxed|\\fbox|\\displaystyle)?\s*\{")
_ABOUT = r"(?:[≈≃≅]|\\(?:thick)?approx(?![A-Za-z])|\\sim(?:eq)?(?![A-Za-z]))"
ABOUT = re.compile(_ABOUT)
_LEADING_ABOUT = re.compile(
    rf"(?:{_ABOUT}|(?:about|approx(?:\.|imately)?|roughly|around)(?![A-Za-z])) ?", re.IGNORECASE
)
_NAME = re.compile(
    rf"(?P<name>[A-Za-z\\][A-Za-z\\ ]*?(?:_\{{?[A-Za-z0-9]+\}}?)?) ?(?:[=:]|{_ABOUT}) ?(?P<rest>[^=].*)", re.DOTALL
)

_DECIMAL = r"(?:(?:[1-9][0-9]{0,2}(?:[, ][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_DECIMAL_ONLY = re.compile(_DECIMAL)
_NUMBER = re.compile(
    rf"""
    (?P<sign>[-+]?)\ ?(?:(?P<currency>USD|(?:US)?\\?[$€£¥₹])\ ?)?(?P<inner_sign>[-+]?)
    (?: (?:(?P<whole>[0-9]+)\ ?)?\\[dtc]?frac\ ?\{{\ ?(?P<top>-?{_DECIMAL})\ ?\}}\ ?\{{\ ?(?P<bottom>-?{_DECIMAL})\ ?\}}
      | (?P<whole2>[0-9]+)\ (?P<top2>[1-9][0-9]*)\ ?/\ ?(?P<bottom2>[0-9]+)
      | (?P<top3>{_DECIMAL})\ ?/\ ?(?P<bottom3>{_DECIMAL})
      | (?P<once>[0-9]*\.[0-9]*)
        (?: \\(?:overline|bar|dot)\ ?(?:\{{\ ?(?P<again>[0-9]+)\ ?\}}|(?P<again2>[0-9]))
          | \((?P<again3>[0-9]+)\)
        )
      | (?P<decimal>{_DECIMAL})
        (?: [eE](?P<exponent>[-+]?[0-9]+)
          | \ ?(?:\\times|\\cdot|\\ast|[x*\u00d7\u00b7\u22c5])\ ?10\ ?\^\ ?\{{?\ ?(?P<exponent2>[-+]?[0-9]+)\ ?\}}?
        )?
    )
    (?P<tail>[^0-9.,].*)?
    """,
    re.VERBOSE | re.DOTALL,
)
_PERCENT = re.compile(
    r" ?(?:\\?%|(?:percent|per cent|pct)(?![A-Za-z])|percentage points?(?![A-Za-z]))(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_CURRENCY_BEHIND = re.compile(r" ?\\?(?P<sign>[$€£¥₹])")
_MAGNITUDE = re.compile(r" ?(?P<word>hundred|thousand|million|billion|trillion)(?![A-Za-z])", re.IGNORECASE)
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FIRST_TOKEN = re.compile(r"[-+]?(?:\\?[$€£¥] ?)?(?P<digits>[0-9][0-9.,]*)")
_TWO_NUMBERS = re.compile(r"[0-9.] +[0-9.]")


def clean_answer(answer: str) -> str:
    """`answer` without wrappings, text commands and typographic spaces; one space for any white space.

    Beyond `MAX_ANSWER_CHARS` it comes back as it is.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    answer = _LONE_BACKSLASH.sub(r"\1", spelled_out(answer).strip())
    if "\\" in answer or "{" in answer or "~" in answer:
        answer = _TEXT.sub(_plain_text, _SPACING.sub(_plain_spacing, answer))
    answer = " ".join(answer.split())
    for _ in range(8):
        before = answer
        if answer[-1:] in tuple(".,;:"):
            answer = answer[:-1].rstrip()
        for left, right in _WRAPPINGS:
            inner = answer[len(left) : len(answer) - len(right)]
            # `$5 + $13$` is not one pair, `$\$18$` is: escaped signs do not count.
            plain = inner.replace(r"\$", "")
            is_pair = not plain.endswith("\\") and left not in plain and right not in plain
            if inner and is_pair and answer.startswith(left) and answer.endswith(right):
                answer = inner.strip()
        braced = _BRACED.match(answer)
        if braced and closing_brace(answer, braced.end() - 1) == len(answer) - 1:
            answer = answer[braced.end() : -1].strip()
        if answer == before:
            break
    return answer


def _plain_spacing(match: re.Match[str]) -> str:
    return match["row"] or ("," if match["comma"] else "" if match["none"] else " ")


def _plain_text(match: re.Match[str]) -> str:
    return match["row"] or f" {match[2]} "


def read_number(answer: str) -> Number | None:
    """The number that a cleaned answer of at most `MAX_ANSWER_CHARS` is, or None."""
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    name = ""
    if named := _NAME.fullmatch(answer):
        name, answer = named["name"].strip(), named["rest"]
    if about := _LEADING_ABOUT.match(answer):
        answer = answer[about.end() :]
    match = _NUMBER.fullmatch(_BARE_FRACTION.sub(_braced_fraction, answer) if "frac" in answer else answer)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    try:
        value = _exact_value(match)
    except ZeroDivisionError:
        return None
    tail = _read_tail(match["tail"] or "", value)
    if tail is None:
        return None
    scale, percent, unit = tail
    if match["currency"]:
        unit = _money(match["currency"], unit)
    if value is not None:
        value *= -scale if "-" in (match["sign"], match["inner_sign"]) else scale
    return Number(value=value, name=name, unit=unit, percent=percent)


def _braced_fraction(match: re.Match[str]) -> str:
    return r"\frac" + "".join(part if part.startswith("{") else f"{{{part}}}" for part in match.groups())


def _exact_value(match: re.Match[str]) -> Fraction | None:
    """None beyond `MAX_EXPONENT`. Raises ZeroDivisionError."""

    def fraction(text: str) -> Fraction:
        return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))

    if match["once"]:
        digits = match["again"] or match["again2"] or match["again3"]
        shift = len(match["once"].partition(".")[2])
        return Fraction("0" + match["once"] + "0") + Fraction(int(digits), (10 ** len(digits) - 1) * 10**shift)
    if match["decimal"]:
        mantissa = fraction(match["decimal"])
        exponent = match["exponent"] or match["exponent2"] or "0"
        if mantissa == 0:
            return mantissa
        # Leading zeros aside, more digits than the limit has is too much; int() must not see a thousand of them.
        if len(exponent.lstrip("+-0")) > len(str(MAX_EXPONENT)) or abs(int(exponent)) > MAX_EXPONENT:
            return None
        return mantissa * Fraction(10) ** int(exponent)
    top = fraction(match["top"] or match["top2"] or match["top3"])
    bottom = fraction(match["bottom"] or match["bottom2"] or match["bottom3"])
    return fraction(match["whole"] or match["whole2"] or "0") + top / bottom


def _read_tail(tail: str, value: Fraction | None) -> tuple[Fraction, bool, Unit] | None:
    """(scale, percent, unit) of what is behind a number; None where it is neither magnitude nor percent sign nor unit."""
    scale = Fraction(1)
    if not tail:
        return scale, False, NO_UNIT
    while magnitude := _MAGNITUDE.match(tail):
        scale *= 10 ** _MAGNITUDES[magnitude["word"].lower()]
        tail = tail[magnitude.end() :]
    if percent := _PERCENT.fullmatch(tail):
        scale, tail = scale / 100, percent["rest"]
    if currency := _CURRENCY_BEHIND.match(tail):
        tail = tail[currency.end() :]
    unit = read_unit(tail, single=value is not None and value * scale <= 1)
    # Three quarters are a fraction, and eight are coins.
    if unit is None or (("quarter", 1) in unit.dimensions and value is not None and value * scale < 4):
        return None
    return scale, percent is not None, _money(currency["sign"], unit) if currency else unit


def _money(sign: str, per: Unit) -> Unit:
    """That of `$5 per day`, which is money too; `per` itself where it is a unit of its own."""
    if any(power > 0 for _, power in per.dimensions):
        return per
    money = read_unit("$" if sign == "USD" else sign[-1])
    assert money is not None
    return Unit(money.factor * per.factor, tuple(sorted(money.dimensions + per.dimensions)))


def same_number(a: Number, b: Number) -> bool:
    """Equal values, and no name or unit that contradicts the other's.

    Where both have units of the same dimensions these count: `3 km` is `3000 m`. Where exactly one has a percent sign, it
    may count or not: `60%` is `0.6`, and also `60`.
    """
    if a.value is None or b.value is None or not _same_name(a.name, b.name) or not agree(a.unit, b.unit):
        return False
    if a.percent != b.percent:
        percent, bare = (a.value, b.value) if a.percent else (b.value, a.value)
        return not (b if a.percent else a).unit.dimensions and bare in (percent, 100 * percent)
    if a.unit.dimensions and b.unit.dimensions:
        return a.value * a.unit.factor == b.value * b.unit.factor
    return a.value == b.value


def _same_name(first: str, second: str) -> bool:
    words = [re.sub(r"s\b", "", text.casefold()).replace(" ", "") for text in (first, second)]
    return not first or not second or words[0] == words[1]


def is_broken_number(side: str) -> bool:
    """Whether `side` begins with a number whose separators make no sense, or has two numbers side by side."""
    token = _FIRST_TOKEN.match(side)
    return (token is not None and not _DECIMAL_ONLY.fullmatch(token["digits"])) or bool(_TWO_NUMBERS.search(side))

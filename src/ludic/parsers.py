r"""Find the final answer in a completion: text in, `ParseResult` out.

Two rules, and their difference is measured by every evaluation: `boxed_parser` takes the last `\boxed{...}` and nothing
else (strict), `last_number_parser` falls back to the last number of the text (flexible). Neither judges the answer;
`ludic.grading` does. Both take time linear in the text whatever is in it, and neither raises: a model writes anything,
and scoring runs between two steps of generation.
"""

import re
from collections import deque
from collections.abc import Iterator

from ludic.types import ParseResult

_BOX_COMMAND_BACKWARDS = re.compile(r"(?<![A-Za-z])(?:dexob|xobf)\\")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# The argument of a box without braces ends at white space, at the end of math mode, or at a brace that is not its own.
_BARE_ARGUMENT = re.compile(r"(?:\\[^()\[\]\s]|\{[^{}\s]*+\}|[^\\{}$\s])++")
_SPACE = re.compile(r"\s*+")
_IS_ANSWER = re.compile(r"[0-9]|\\[A-Za-z]|^[A-Za-z]$")

# A comma groups thousands only between groups of exactly three digits. Possessive quantifiers: no backtracking into
# a run of digits, so a megabyte of them is read once.
_DIGITS = r"(?:[1-9][0-9]{0,2}(?:(?:,|\{,\}|,\\!|\\,)[0-9]{3})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]++)?+|(?<![0-9])\.[0-9]++)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)\]}}%.])[-+\u2212])?+        # a minus after a word or a number is a hyphen or a subtraction
    (?P<currency>\\?[$\u20ac\u00a3\u00a5][ ]?)?+
    (?P<inner_sign>(?<=[$\u20ac\u00a3\u00a5])[-+\u2212])?+
    (?P<value>
        (?:[0-9]++[ ]?)?+\\[dt]?frac\{{[-+]?+{_DECIMAL}\}}\{{[-+]?+{_DECIMAL}\}}
      | [0-9]++[ ][0-9]++/[0-9]++
      | {_DECIMAL}(?:[eE][-+]?+[0-9]++)?+(?:/{_DECIMAL})?+
    )
    (?P<percent>[ ]?\\?%)?+
    """,
    re.VERBOSE,
)


def boxed_parser(text: str) -> ParseResult:
    r"""The content of the last `\boxed` or `\fbox`, stripped of white space.

    Braces nest, and `\{` and `\}` do not count. The last box decides even if it is spoiled: an unclosed brace or an
    empty box is an error, not a reason to take an earlier box. A box without braces, `\boxed 5`, holds what follows up
    to white space or the end of math mode; a `\boxed` that is followed by neither braces, a digit, a LaTeX command nor
    a single letter is a mention of the command ("as I wrote in \boxed"), and is passed over.

    Example:
        >>> boxed_parser(r"so \boxed{\frac{36}{2}} eggs")
        ParseResult(answer='\\frac{36}{2}', error=None)
        >>> boxed_parser("eighteen")
        ParseResult(answer=None, error='no \\boxed{...} in the text')
    """
    end = len(text)
    for start, argument_start in _boxes_from_behind(text):
        argument_start = _end_of(_SPACE, text, argument_start, end)
        if text[argument_start : argument_start + 1] == "{" and argument_start < end:
            return _braced_content(text, argument_start)
        # Reading stops where a later box begins, so that many boxes in a row are still read once.
        argument = text[argument_start : _end_of(_BARE_ARGUMENT, text, argument_start, end)].rstrip(".,;:!?*")
        if _IS_ANSWER.search(argument):
            return ParseResult(answer=argument)
        end = start
    return ParseResult(error=r"no \boxed{...} in the text")


def last_number_parser(text: str) -> ParseResult:
    r"""The content of the last box if `boxed_parser` finds one, else the last number in the text, as it is written.

    A number has ASCII digits, and may have a sign, thousands separators (`1,000`; in `1,00` the comma separates two
    numbers), decimals, an exponent (`1e3`), a percent sign, and be a fraction (`3/4`, `\frac{3}{4}`, `2 1/2`). The
    percent sign stays with the number, for 18% is not 18; a currency sign does not, nor does a full stop behind it.

    Example:
        >>> last_number_parser("She pays $1,234.50. That is it.").answer
        '1,234.50'
        >>> last_number_parser("From 20-5 we get -15%").answer
        '-15%'
    """
    boxed = boxed_parser(text)
    if boxed.answer is not None:
        return boxed
    last_only = deque(_NUMBER.finditer(text), maxlen=1)
    if not last_only:
        return ParseResult(error="no box and no number in the text")
    last = last_only[0]
    sign = (last["sign"] or last["inner_sign"] or "").replace("\u2212", "-").replace("+", "")
    return ParseResult(answer=sign + last["value"] + (last["percent"] or "").strip())


def closing_brace(text: str, start: int) -> int | None:
    r"""The index of the brace that closes the one at `start`, or None. `\{` and `\}` are skipped.

    Example:
        >>> closing_brace("{a{b}}", 0)
        5
    """
    depth = 0
    for match in _BRACE.finditer(text, start):
        character = match.group()
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _boxes_from_behind(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each box command, the last first: what stands before the one that decides is not looked at."""
    for command in _BOX_COMMAND_BACKWARDS.finditer(text[::-1]):
        yield len(text) - command.end(), len(text) - command.start()


def _braced_content(text: str, start: int) -> ParseResult:
    end = closing_brace(text, start)
    if end is None:
        return ParseResult(error="the last box is not closed")
    content = text[start + 1 : end].strip()
    return ParseResult(answer=content) if content else ParseResult(error="the last box is empty")


def _end_of(pattern: re.Pattern[str], text: str, start: int, end: int) -> int:
    match = pattern.match(text, start, end)
    return start if match is None else match.end()

r"""Find the final answer in a completion: text in, `ParseResult` out.

Two rules, and their difference is measured by every evaluation: `boxed_parser` takes the last `\boxed{...}` and nothing
else (strict), `last_number_parser` falls back to the last number of the text (flexible). Neither judges the answer;
`ludic.task.grading` does. Both take time linear in the text whatever is in it, and neither raises: a model writes anything,
and scoring runs between two steps of generation.
"""

import re

from ludic.task.typography import SUPERSCRIPT_DIGITS, VULGAR_FRACTIONS, ascii_look, without_invisible
from ludic.types import ParseResult

_BOX_COMMAND_BACKWARDS = re.compile(r"(?<![A-Za-z])(?:dexob|xobf)\\")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# The argument of a box without braces ends at white space, at the end of math mode, or at a brace that is not its own.
_BARE_ARGUMENT = re.compile(r"(?:\\[^()\[\]\s]|\{[^{}\s]*+\}|[^\\{}$\s])++")
_IS_ANSWER = re.compile(r"[0-9]|\\[A-Za-z]|^[A-Za-z]$")

_THINKING_ENDS = re.compile(r">(?:gni)?kniht/<|\]KNIHT/\[", re.IGNORECASE)
# What stands in a box that is only spoken of: nothing, dots, underscores, a question mark, `your answer`.
_NO_ANSWER = re.compile(
    r"(?:[\s.…_?~]|\\(?:[lc]?dots|ldot|square|quad|[,;:!\s])|\\(?:text|textbf|mathrm)\s*\{[\s.…_?]*\})*+"
    r"(?:\\(?:text|textbf|textit|mathrm)\s*\{)?[\s<\[]*+"
    r"(?:(?:the |my |your |final |numeric(?:al)? )*(?:answer|result|number|value|solution)(?: here)?)?[\s>\].…]*\}?",
    re.IGNORECASE,
)
_END_SPACE = re.compile(r"(?<!\\)((?:\\\\)*+)\\\Z")

# Separators of thousands stand only between groups of exactly three digits; of a list of numbers, `1 2 300`, none is.
# Possessive quantifiers: no backtracking into a run of digits, so a megabyte of them is read once.
_SEPARATOR = r"(?:,(?:\\!\ ?)?|\{,\}|\\[,;:!\ ]|\\thinspace\ ?|\{\\,\}|[ ~])"
_DIGITS = rf"(?:(?<![0-9][ ])[1-9][0-9]{{0,2}}(?:{_SEPARATOR}[0-9]{{3}})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]++)?+|(?<![0-9])\.[0-9]++)"
_POWER = rf"(?:[ ]?\^[ ]?(?:\{{[ ]?[-+]?[0-9]++[ ]?\}}|[-+]?[0-9]++)|\u207b?[{SUPERSCRIPT_DIGITS}]++)"
_NUMBER = re.compile(
    rf"""
    (?=[-+.0-9^_$\\\u20ac\u00a3\u00a5\u20b9{VULGAR_FRACTIONS}{SUPERSCRIPT_DIGITS}])  # For speed: nothing below begins otherwise.
    (?:
    # Exponents of units and variables, and indices, are passed over: `48 m^2`, `48 m2`, `x_1`.
    (?:\^|(?<=[A-Za-z])_)[ ]?(?:\{{[^{{}}]*+\}}|[-+]?[0-9]++)
  | (?:(?<=\bm)|(?<=\b[cmk]m)|(?<=\bft)|(?<=\bin))[23](?![0-9])
  | (?P<sign>(?<![\w)\]}}%.])[-+])?+              # a minus after a word or a number is a hyphen or a subtraction
    (?P<currency>\\?[$\u20ac\u00a3\u00a5\u20b9][ ]?)?+
    (?P<inner_sign>(?<=[$\u20ac\u00a3\u00a5\u20b9])[-+])?+
    (?P<value>
      (?: (?:[0-9]++[ ]?)?+\\[dtc]?frac[ ]?(?:\{{[ ]?[-+]?+{_DECIMAL}[ ]?\}}[ ]?|[0-9][ ]?){{2}}(?<![ ])
        | [0-9]++[ ][0-9]++[ ]?/[ ]?[0-9]++
        | (?:[0-9]++[ ]?)?+(?:[{VULGAR_FRACTIONS}]|[{SUPERSCRIPT_DIGITS}]++/[₀-₉]++)
        | [0-9]++\.[0-9]*+(?:\\(?:overline|bar|dot)[ ]?(?:\{{[ ]?[0-9]++[ ]?\}}|[0-9])|\([0-9]++\))
        | {_DECIMAL}
          (?:[eE][-+]?+[0-9]++|[ ]?(?:\\times|\\cdot|\\ast|[x*\u00d7\u00b7\u22c5])[ ]?10{_POWER}|{_POWER})?+
          (?:[ ]?/[ ]?{_DECIMAL})?+
      )
      (?:[ ]?(?:hundred|thousand|million|billion|trillion)(?![A-Za-z]))*+
    )
    (?P<percent>[ ]?(?:\\?%|(?:percent|per[ ]cent|pct)(?![A-Za-z])))?+
    )
    """,
    re.VERBOSE,
)


def boxed_parser(text: str) -> ParseResult:
    r"""The content of the last `\boxed` or `\fbox`, stripped of white space.

    Braces nest, and `\{` and `\}` do not count. The last box decides even if it is spoiled: an unclosed brace is an
    error, not a reason to take an earlier box. A box without braces, `\boxed 5`, holds what follows up to white space or
    the end of math mode. A box that holds no answer (`\boxed{}`, `\boxed{...}`), and a `\boxed` that is followed by neither
    braces, a digit, a LaTeX command nor a single letter, are mentions of the command ("as I wrote in \boxed"), and are
    passed over. Of a text with `</think>` only what follows it counts, if anything does.

    Example:
        >>> boxed_parser(r"so \boxed{\frac{36}{2}} eggs")
        ParseResult(answer='\\frac{36}{2}', error=None)
        >>> boxed_parser("eighteen")
        ParseResult(answer=None, error='no \\boxed{...} in the text')
    """
    text = _after_thinking(text)
    end = len(text)
    error = r"no \boxed{...} in the text"
    # From behind: what stands before the box that decides is not looked at.
    for command in _BOX_COMMAND_BACKWARDS.finditer(text[::-1]):
        # Reading stops where a later box begins, so that many boxes in a row are still read once.
        argument = text[len(text) - command.start() : end].lstrip()
        if argument.startswith("{"):
            opening = end - len(argument)
            closing = closing_brace(text, opening)
            if closing is None:
                return ParseResult(error="the last box is not closed")
            content = _END_SPACE.sub(r"\1", text[opening + 1 : closing].strip()).strip()
            if _NO_ANSWER.fullmatch(content) is None:
                return ParseResult(answer=content)
            error = "the last box is empty"
        elif bare := _BARE_ARGUMENT.match(argument):
            answer = bare.group().rstrip(".,;:!?*")
            if _IS_ANSWER.search(answer):
                return ParseResult(answer=answer)
        end = len(text) - command.end()
    return ParseResult(error=error)


def last_number_parser(text: str) -> ParseResult:
    r"""The content of the last box if `boxed_parser` finds one, else the last number in the text, as it is written.

    A number may have a sign, thousands separators (`1,000`, `1\,000`, `1 000`; in `1,00` the comma separates two
    numbers), decimals, an exponent (`1e3`, `1.8 \times 10^4`, `2^{10}`), a percent sign and a magnitude (`3 million`), and
    be a fraction (`3/4`, `\frac{3}{4}`, `2 1/2`, `½`). The percent sign stays with the number, for 18% may be 0.18; a
    currency sign does not, nor does a full stop behind it. Exponents of units and indices are no numbers: `48 m^2`, `x_1`.

    Example:
        >>> last_number_parser("She pays $1,234.50. That is it.").answer
        '1,234.50'
        >>> last_number_parser("From 20-5 we get -15%").answer
        '-15%'
    """
    boxed = boxed_parser(text)
    if boxed.answer is not None:
        return boxed
    text = without_invisible(_after_thinking(text))
    last = None
    for match in _NUMBER.finditer(ascii_look(text)):  # Each character of it stands where it stands in `text`.
        if match["value"]:
            last = match
    if last is None:
        return ParseResult(error="no box and no number in the text")
    sign = (last["sign"] or last["inner_sign"] or "").replace("+", "")
    return ParseResult(answer=sign + text[last.start("value") : last.end()])


def _after_thinking(text: str) -> str:
    """What follows the last `</think>`, or all of `text` where nothing does."""
    if "</" not in text and "[/" not in text:
        return text
    thinking = _THINKING_ENDS.search(text[::-1])
    after = text[len(text) - thinking.start() :] if thinking else ""
    return after if after.strip() else text


def closing_brace(text: str, start: int) -> int | None:
    r"""The index of the brace that closes the one at `start`, or None. `\{` and `\}` are skipped.

    Example:
        >>> closing_brace("{a{b}}", 0)
        5
    """
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None

r"""How much work an answer would be for math-verify, guessed from its structure before any algebra.

    "(9*2)" --cost--> 5.0          "9^{9^{9}}" --cost--> inf: 369,693,100 digits

The guess serves twice: cheap answers are graded before dear ones, and what is hopeless (`inf`) is not tried at all. It
reads at most `MAX_TOKENS` tokens, once, from left to right, and errs on the side of trying: only sizes that are written
down are counted (how deep, how many tokens, how big the numbers that powers, factorials and sums would reach), so that
an integral that never ends costs as little here as one that is easy. Deadlines are for those.
"""

import math
import re
from dataclasses import dataclass, field

MAX_TOKENS = 500
MAX_DEPTH = 16
"""Of brackets. math-verify's grammar tries each pair in several ways: 25 pairs of parentheses take it 4 seconds."""
MAX_DIGITS = 100_000
"""Of any number that is worked out on the way: `2^{300000}` is within, `9^{9^9}` is not."""
MAX_LITERAL_DIGITS = 500
MAX_EXPANDED_TERMS = 10_000
"""`(x+y+z)^{100}` has 5,151 when it is multiplied out."""
MAX_LOOP = 1e6
"""The upper bound of a sum, a product or a binomial coefficient."""

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9]+(?:\.[0-9]+)?|\S", re.DOTALL)
_OPENING = frozenset(("(", "[", "{", r"\{"))
_CLOSING = frozenset((")", "]", "}", r"\}"))
_SEPARATORS = frozenset(("+", "-", ",", ";", "=", "<", ">", "&", r"\\", r"\pm", r"\mp", ":"))
_SILENT = frozenset((r"\left", r"\right", r"\,", r"\;", r"\ ", "*", r"\cdot", r"\times", "$", r"\$"))
_LOOPS = frozenset((r"\sum", r"\prod", r"\binom", r"\dbinom", r"\tbinom", r"\Gamma"))
_COSTLY = frozenset((r"\int", r"\iint", r"\iiint", r"\oint", r"\lim", r"\sum", r"\prod", r"\binom", r"\pmod", r"\bmod"))
_FRACTIONS = frozenset((r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"))


class _Hopeless(Exception):
    """The answer is not worth trying."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operand:
    digits: float = 0.0
    """Decimal digits of its value, at most (log10); 0 where it has none, as x."""
    terms: int = 1
    symbolic: bool = False
    loop: bool = False
    """It is a sum, product or the like: what follows its `^`, or it, says how far it goes."""


@dataclass(slots=True)
class _Group:
    """What is between two brackets, as far as it is read."""

    digits: float = 0.0
    """Of its biggest term so far."""
    term_digits: float = 0.0
    terms: int = 0
    """Of the terms before the one that is being read, if it all were multiplied out; `factor_terms` are that one's."""
    factor_terms: int = 1
    symbolic: bool = False
    chain: list[_Operand] = field(default_factory=list)
    """a, b, c of the `a^b^c` that is being read."""
    after: str = ""
    """The operator or command that the next operand belongs to."""
    fraction: int = 0
    """2 where the next operand is a numerator, 1 where it is a denominator, which makes no value bigger."""


def cost(answer: str) -> float:
    r"""Tokens, weighted by what they tend to take; `inf` for what math-verify cannot be expected to finish.

    Example:
        >>> cost("(9*2)"), cost(r"9^{9^{9}}"), cost(r"2^{2^{10}}")
        (5.0, inf, 9.0)
    """
    groups = [_Group()]
    total = 0.0
    try:
        for count, token in enumerate(_TOKEN.finditer(answer)):
            text = token.group()
            if count >= MAX_TOKENS:
                raise _Hopeless
            total += 100.0 if text in _COSTLY else 1.0
            _read(text, groups)
        while len(groups) > 1:
            _close(groups)
        _end_operand(groups[0])
    except _Hopeless:
        return math.inf
    return total


def _read(text: str, groups: list[_Group]) -> None:
    group = groups[-1]
    if text in _OPENING:
        if len(groups) > MAX_DEPTH:
            raise _Hopeless
        groups.append(_Group())
    elif text in _CLOSING:
        if len(groups) > 1:
            _close(groups)
    elif text == "^" or text == "_":
        group.after = text
    elif text == "!":
        if group.chain:
            group.chain[-1] = _factorial(group.chain[-1])
    elif text in _SEPARATORS:
        _end_operand(group)
        group.digits = max(group.digits, group.term_digits)
        group.term_digits = 0.0
        if text in "+-":
            group.terms += group.factor_terms
            group.factor_terms = 1
    elif text == "/":
        _end_operand(group)
        group.fraction = 1
    elif text in _FRACTIONS:
        _end_operand(group)
        group.fraction = 2
    elif text not in _SILENT:
        _add(group, _operand(text))


def _operand(text: str) -> _Operand:
    if not text[0].isdecimal() or not text.isascii():
        return _Operand(symbolic=True, loop=text in _LOOPS)
    whole = text.partition(".")[0].lstrip("0")
    if len(text) > MAX_LITERAL_DIGITS:
        raise _Hopeless
    return _Operand(digits=math.log10(int(whole)) if whole else 0.0)


def _close(groups: list[_Group]) -> None:
    group = groups.pop()
    _end_operand(group)
    terms = min(group.terms + group.factor_terms, MAX_EXPANDED_TERMS)
    digits = max(group.digits, group.term_digits) + (math.log10(terms) if group.digits else 0.0)
    _add(groups[-1], _Operand(digits=digits, terms=terms, symbolic=group.symbolic))


def _add(group: _Group, operand: _Operand) -> None:
    after, group.after = group.after, ""
    if after == "_":
        return  # An index, or where a sum begins.
    if after == "^" and group.chain:
        group.chain.append(operand)
        return
    if len(group.chain) == 1 and group.chain[0].loop and _whole(operand.digits) > MAX_LOOP:
        raise _Hopeless
    _end_operand(group)
    group.chain = [operand]


def _end_operand(group: _Group) -> None:
    """Multiply the operand that was read last, with all its powers, into the group's term."""
    if not group.chain:
        return
    value = group.chain.pop()
    while group.chain:
        value = _power(group.chain.pop(), value)
    group.symbolic = group.symbolic or value.symbolic
    group.factor_terms = min(group.factor_terms * value.terms, MAX_EXPANDED_TERMS)
    if group.fraction != 1:
        group.term_digits += value.digits
    group.fraction = max(0, group.fraction - 1)
    if group.term_digits > MAX_DIGITS:
        raise _Hopeless


def _power(base: _Operand, exponent: _Operand) -> _Operand:
    times = _whole(exponent.digits)
    if base.loop:
        if times > MAX_LOOP:
            raise _Hopeless
        return _Operand(symbolic=True)
    digits = base.digits * times
    terms = 1
    if base.symbolic and base.terms > 1:  # It may be multiplied out: (times + terms - 1) over (terms - 1).
        log_terms = math.lgamma(times + base.terms) - math.lgamma(times + 1) - math.lgamma(base.terms)
        if log_terms > math.log(MAX_EXPANDED_TERMS):
            raise _Hopeless
        terms = round(math.exp(log_terms))
    if digits > MAX_DIGITS:
        raise _Hopeless
    return _Operand(digits=digits, terms=terms, symbolic=base.symbolic or exponent.symbolic)


def _factorial(operand: _Operand) -> _Operand:
    digits = _whole(operand.digits) * operand.digits
    if digits > MAX_DIGITS:
        raise _Hopeless
    return _Operand(digits=digits, symbolic=operand.symbolic)


def _whole(digits: float) -> float:
    """The number with so many digits, as far as floats go."""
    return math.pow(10.0, min(digits, 300.0))

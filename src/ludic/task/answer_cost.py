r"""How much work an answer would be for math-verify, guessed from its structure before any algebra.

    "(9*2)" --cost--> 5.0          "9^{9^{9}}" --cost--> inf: 369,693,100 digits

The guess serves twice: cheap answers are graded before dear ones, and what is hopeless (`inf`) is not tried at all. It
errs on the side of trying: only sizes that are written down are counted (how deep, how many tokens, how big the numbers
that powers, factorials and sums would reach). An integral that never ends looks easy here: deadlines are for those.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

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


def cost(answer: str) -> float:
    r"""Tokens, weighted by what they tend to take; `inf` for what math-verify cannot be expected to finish.

    Example:
        >>> cost("(9*2)"), cost(r"9^{9^{9}}"), cost(r"2^{2^{10}}")
        (5.0, inf, 9.0)
    """
    tokens = [match.group() for match in islice(_TOKEN.finditer(answer), MAX_TOKENS + 1)]
    try:
        if len(tokens) > MAX_TOKENS:
            raise _Hopeless
        _read(iter(tokens), depth=0)
    except _Hopeless:
        return math.inf
    return sum((100.0 if text in _COSTLY else 1.0 for text in tokens), 0.0)


def _read(tokens: Iterator[str], depth: int) -> _Operand:
    """What stands between two brackets, up to the closing one or the end."""
    if depth > MAX_DEPTH:
        raise _Hopeless
    group = _Group()
    for text in tokens:
        if text in _CLOSING:
            if depth:
                break
        elif text in _OPENING:
            group.add(_read(tokens, depth + 1))
        elif text in ("^", "_"):
            group.after = text
        elif text == "!":
            if group.chain:
                group.chain[-1] = _factorial(group.chain[-1])
        elif text in _SEPARATORS:
            group.end_term(is_sum=text in "+-")
        elif text == "/" or text in _FRACTIONS:
            group.end_operand()
            group.fraction = 1 if text == "/" else 2
        elif text not in _SILENT:
            group.add(_operand(text))
    return group.value()


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
    """The operator that the next operand belongs to."""
    fraction: int = 0
    """2 where the next operand is a numerator, 1 where it is a denominator, which makes no value bigger."""

    def add(self, operand: _Operand) -> None:
        after, self.after = self.after, ""
        if after == "_":
            return  # An index, or where a sum begins.
        if after == "^" and self.chain:
            self.chain.append(operand)
            return
        if len(self.chain) == 1 and self.chain[0].loop and _whole(operand.digits) > MAX_LOOP:
            raise _Hopeless
        self.end_operand()
        self.chain = [operand]

    def end_operand(self) -> None:
        """Multiply the operand that was read last, with all its powers, into the group's term."""
        if not self.chain:
            return
        value = self.chain.pop()
        while self.chain:
            value = _power(self.chain.pop(), value)
        self.symbolic = self.symbolic or value.symbolic
        self.factor_terms = min(self.factor_terms * value.terms, MAX_EXPANDED_TERMS)
        if self.fraction != 1:
            self.term_digits += value.digits
        self.fraction = max(0, self.fraction - 1)
        if self.term_digits > MAX_DIGITS:
            raise _Hopeless

    def end_term(self, *, is_sum: bool) -> None:
        self.end_operand()
        self.digits = max(self.digits, self.term_digits)
        self.term_digits = 0.0
        if is_sum:
            self.terms += self.factor_terms
            self.factor_terms = 1

    def value(self) -> _Operand:
        self.end_operand()
        terms = min(self.terms + self.factor_terms, MAX_EXPANDED_TERMS)
        digits = max(self.digits, self.term_digits) + (math.log10(terms) if self.digits else 0.0)
        return _Operand(digits=digits, terms=terms, symbolic=self.symbolic)


def _operand(text: str) -> _Operand:
    if not text[0].isdecimal() or not text.isascii():
        return _Operand(symbolic=True, loop=text in _LOOPS)
    whole = text.partition(".")[0].lstrip("0")
    if len(text) > MAX_LITERAL_DIGITS:
        raise _Hopeless
    return _Operand(digits=math.log10(int(whole)) if whole else 0.0)


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

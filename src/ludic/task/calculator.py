"""A calculator for a model's text: exact arithmetic, of which no expression takes long.

Python's parser reads the expression, and nothing of it is executed: numbers, + - * / ** and parentheses are worked out here, as
fractions, and every value is bounded before it is computed. It imports nothing of ludic, so that a process of its own
(`ludic.task.tools.Tool`) starts at once.
"""

import ast
import re
import warnings
from fractions import Fraction

MAX_CHARS = 200
MAX_BITS = 512
"""Of a value's numerator and denominator: 154 digits."""

_GROUPED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "^": "**", "$": " "})


def calculate(text: str) -> str:
    """The value of an arithmetic expression, or a line that begins with `error`.

    A whole number is written in full, any other in ten significant digits.

    Example:
        >>> calculate("1,200 * 3 / 7"), calculate("2 ** 0.5"), calculate("9 ** 9 ** 9")
        ('514.2857143', 'error: an exponent has to be a whole number', 'error: the value is too large')
    """
    if len(text) > MAX_CHARS:
        return f"error: more than {MAX_CHARS} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # `3(4)`
            source = _GROUPED.sub("", text.translate(_SIGNS)).strip()
            tree = ast.parse(source, mode="eval")
        value = _value(tree.body, source)
    except ZeroDivisionError:
        return "error: division by zero"
    except ArithmeticError as error:
        return f"error: {error}"
    except (
        SyntaxError,
        ValueError,
        MemoryError,
        RecursionError,
    ):  # the last two of its parser, for what is nested deeply
        return "error: this is not arithmetic"
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr, source: str) -> Fraction:
    """The value of one part of the expression `source`.

    Raises:
        ArithmeticError: a value is too large, or an exponent is not a whole number.
        ZeroDivisionError: a division by zero.
        SyntaxError: something that is not arithmetic.
    """
    match node:
        case ast.Constant(value=float()):
            return _bounded(_decimal(ast.get_source_segment(source, node) or ""))
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return _bounded(Fraction(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, source)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, source)
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_combined(_value(left, source), op, _value(right, source)))
    raise SyntaxError


def _decimal(digits: str) -> Fraction:
    """A decimal by its digits as they are written, which a float would round."""
    exponent = digits.lower().partition("e")[2]
    if exponent and abs(int(exponent)) > MAX_BITS:  # before it is computed
        raise ArithmeticError("the value is too large" if int(exponent) > 0 else "the value is too small")
    return Fraction(digits)


def _combined(left: Fraction, op: ast.operator, right: Fraction) -> Fraction:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow():
            if right.denominator != 1:
                raise ArithmeticError("an exponent has to be a whole number")
            if abs(right) > MAX_BITS or _bits(left) * abs(right) > 2 * MAX_BITS:  # before it is computed
                raise ArithmeticError("the value is too large")
            return Fraction(left ** int(right))
    raise SyntaxError


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ArithmeticError("the value is too large" if abs(value) > 1 else "the value is too small")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())

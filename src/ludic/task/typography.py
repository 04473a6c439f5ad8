r"""Characters that stand for others: full-width digits, dashes for a minus, `½`, `m²`, zero-width spaces.

Models write numbers with typographic characters. The parsers look for numbers in `ascii_look`, which keeps every
position; the grader reads `spelled_out`, in which nothing but ASCII is left of them. Digits of other scripts than
Latin stay as they are, and are no digits.
"""

import re
import unicodedata

VULGAR_FRACTIONS = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
SUPERSCRIPT_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"

# Bidirectional overrides are not among them: `\u202e81` is shown as 18, and must not be read as 81.
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
_SPACES = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_DASHES = "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # Not the em dash: it parts sentences.
_LOOKS_LIKE: dict[int, int | str] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # Full-width forms of all of ASCII.
    **{code: ord("0") + (code - 0x1D7CE) % 10 for code in range(0x1D7CE, 0x1D800)},  # Bold and other digits.
    **dict.fromkeys(map(ord, _SPACES), " "),
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **{0x2044: "/", 0x2215: "/", 0xFFE5: "¥", 0xFFE1: "£", 0xFE6A: "%"},
}
_SUPERSCRIPTS = re.compile(rf"⁻?[{SUPERSCRIPT_DIGITS}]+")
_SMALL_FRACTION = re.compile(rf"([{SUPERSCRIPT_DIGITS}]+)/([₀-₉]+)")
_VULGAR = re.compile(rf"[{VULGAR_FRACTIONS}]")
_RANGE_DASH = re.compile(r"(?<=[0-9])( ?)[\u2012\u2013]")


def without_invisible(text: str) -> str:
    """`text` without the characters that take no space."""
    return text if text.isascii() else text.translate(_INVISIBLE)


def ascii_look(text: str) -> str:
    r"""`text` with full-width and mathematical digits, dashes and spaces as ASCII; of the same length.

    Example:
        >>> ascii_look("\u2212\uff11\uff18\uff05")
        '-18%'
    """
    return text if text.isascii() else text.translate(_LOOKS_LIKE)


def spelled_out(text: str) -> str:
    r"""`ascii_look`, with vulgar fractions and superscripts as ASCII too, and without invisible characters.

    Example:
        >>> spelled_out("2½ m²")
        '2 1/2 m^{2}'
    """
    if text.isascii():
        return text
    # Between numbers an en dash is a range, and must not become a subtraction.
    text = ascii_look(_RANGE_DASH.sub(r"\1—", without_invisible(text)))
    text = _SMALL_FRACTION.sub(lambda match: f" {_digits(match[1])}/{_digits(match[2])}", text)
    text = _VULGAR.sub(lambda match: " " + _digits(match[0]), text)
    return _SUPERSCRIPTS.sub(lambda match: f"^{{{_digits(match[0])}}}", text)


def _digits(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")

r"""What graders are tried on: ordinary answers as models write them, LaTeX answers of competition kind, and poison.

Everything is made from templates and a seed; nothing comes from a data set.
"""

import random
from collections.abc import Callable, Iterator

Pair = tuple[str, str]
"""(prediction, target)"""


def ordinary(count: int, seed: int) -> list[Pair]:
    r"""Answers to word problems with a number as the target; one in 50 needs algebra, three in ten are wrong.

    Example:
        >>> ordinary(3, seed=0)
        [('-99/3', '-34'), ('\\sqrt{95218564}', '9,658'), ('955989.5', '955,989')]
    """
    draw = random.Random(seed)
    return [_ordinary(draw, algebra=i % 50 == 1) for i in range(count)]


def _ordinary(draw: random.Random, *, algebra: bool) -> Pair:
    value = draw.choice(
        [draw.randint(0, 99), draw.randint(100, 9_999), draw.randint(10_000, 999_999), -draw.randint(1, 99)]
    )
    target = f"{value:,}" if draw.random() < 0.3 else str(value)
    said = value if draw.random() < 0.7 else value + draw.choice([-10, -1, 1, 2, 100])
    if not algebra:
        return draw.choice(_DRESSES)(said), target
    half = value // 2
    return draw.choice(_ALGEBRA).format(said, half, said - half, said * said), target


_ALGEBRA = ("({0})", "{1} + {2}", "{1}+{2}", r"1 \times {0} + 0", r"\sqrt{{{3}}}", "{0}x", r"{0}\pi", "{0} or {2}")
_UNITS = ("dollars", "apples", "miles per hour", "hours", "cm", "people")
_DRESSES: tuple[Callable[[int], str], ...] = (
    *(str,) * 8,
    lambda n: f"{n:,}",
    lambda n: f"{n}.00",
    lambda n: f"{n}.5",
    lambda n: rf"\${n:,}",
    lambda n: f"${n}$",
    lambda n: rf"{n}\%",
    lambda n: rf"\frac{{{2 * n}}}{{2}}",
    lambda n: f"{3 * n}/3",
    lambda n: rf"{n}\text{{ {_UNITS[n % len(_UNITS)]}}}",
    lambda n: f"{n} {_UNITS[n % len(_UNITS)]}",
    lambda n: f"x = {n}",
    lambda n: f"the answer is {n}",
)


# --- Answers that need algebra, and are none of them hostile --------------------------------------------------------


def competition() -> list[Pair]:
    """About 300 pairs such as competition problems have: sets, intervals, matrices, roots, polynomials, big powers."""
    pairs = [*_EQUAL, *_UNEQUAL]
    for n in (2, 3, 5, 7, 12, 35):
        pairs += [
            (rf"{n}\sqrt{{{n + 1}}}", rf"\sqrt{{{n * n * (n + 1)}}}"),
            (rf"\frac{{{n}\pi}}{{{n + 1}}}", rf"\frac{{{n}}}{{{n + 1}}}\pi"),
            (rf"\frac{{1}}{{\sqrt{{{n}}}}}", rf"\frac{{\sqrt{{{n}}}}}{{{n}}}"),
            (rf"({n}, {n + 1})", rf"({n},{n + 1})"),
            (rf"[{n}, \infty)", rf"\left[{n},\infty\right)"),
            (rf"(-\infty, -{n}) \cup ({n}, \infty)", rf"(-\infty,-{n})\cup({n},\infty)"),
            (rf"\{{{n}, {n + 2}, {n + 4}\}}", rf"\{{{n + 4}, {n}, {n + 2}\}}"),
            (rf"{n}, {n + 1}, {n + 5}", rf"{n + 5}, {n + 1}, {n}"),
            (rf"x^{{{n}}} - {n}x + 1", rf"1 - {n}x + x^{n % 10}"),
            (rf"(x - {n})(x + {n})", rf"x^2 - {n * n}"),
            (rf"\frac{{x + {n}}}{{x - {n}}}", rf"\frac{{{n} + x}}{{x - {n}}}"),
            (
                rf"\begin{{pmatrix}} {n} & 0 \\ 1 & {n} \end{{pmatrix}}",
                rf"\begin{{pmatrix}}{n}&0\\1&{n}\end{{pmatrix}}",
            ),
            (rf"\begin{{pmatrix}} {n} \\ -1 \\ 0 \end{{pmatrix}}", rf"\begin{{pmatrix}}{n}\\-1\\0\end{{pmatrix}}"),
            (rf"2^{{{n * 100}}}", rf"4^{{{n * 50}}}"),
            (rf"2^{{{n * 100}}} - 1", rf"4^{{{n * 50}}} - 1"),
            (rf"{n}!", str(_factorial(n))),
            (rf"\binom{{{2 * n}}}{{{n}}}", str(_factorial(2 * n) // _factorial(n) ** 2)),
            (rf"{n} + {n + 1}i", rf"{n + 1}i + {n}"),
            (rf"\log_{{2}} {n}", rf"\frac{{\ln {n}}}{{\ln 2}}"),
            (rf"e^{{{n}x}}", rf"e^{{x \cdot {n}}}"),
            (rf"\sqrt[3]{{{n}}}", rf"{n}^{{\frac{{1}}{{3}}}}"),
            (rf"\sqrt{{{n} + \sqrt{{{n}}}}}", rf"\sqrt{{\sqrt{{{n}}} + {n}}}"),
            (rf"\sin {n}x", rf"\sin({n}x)"),
            (rf"x \le {n}", rf"x \leq {n}"),
            (rf"-{n} < x < {n}", rf"(-{n}, {n})"),
            (rf"y = {n}x + 1", rf"y = 1 + {n}x"),
            (rf"x = {n}, y = {n + 1}", rf"({n}, {n + 1})"),
            (rf"\frac{{{n}}}{{1 + \frac{{1}}{{1 + \frac{{1}}{{{n}}}}}}}", rf"\frac{{{n}({n} + 1)}}{{{2 * n + 1}}}"),
            (rf"{n}\sqrt{{2}} + {n}\sqrt{{3}}", rf"{n}(\sqrt{{2}} + \sqrt{{3}})"),
            (rf"\left(\frac{{{n}}}{{2}}, -\frac{{1}}{{{n}}}\right)", rf"(\frac{{{n}}}{{2}}, \frac{{-1}}{{{n}}})"),
            (rf"{n}a^2b - {n}ab^2", rf"{n}ab(a - b)"),
            (rf"{n}\text{{ cm}}^2 + 1", rf"{n} + 1"),
            (rf"|x - {n}|", rf"|{n} - x|"),
            (rf"{n} \pm \sqrt{{{n}}}", rf"{n} - \sqrt{{{n}}}, {n} + \sqrt{{{n}}}"),
            (rf"\sum_{{k=1}}^{{{n}}} k", str(n * (n + 1) // 2)),
        ]
    return pairs


def _factorial(n: int) -> int:
    return n * _factorial(n - 1) if n else 1


_EQUAL: list[Pair] = [
    (r"\frac{\sqrt{5} - 1}{2}", r"\frac{-1 + \sqrt{5}}{2}"),
    (r"\frac{3 + 2\sqrt{2}}{1}", r"(1 + \sqrt{2})^2"),
    (r"x^4 + 4x^3 + 6x^2 + 4x + 1", r"(x+1)^4"),
    (r"a^3 + 3a^2b + 3ab^2 + b^3", r"(a+b)^3"),
    (r"x^{10} - x^9 + x^8 - x^7 + x^6 - x^5 + x^4 - x^3 + x^2 - x + 1", r"\frac{x^{11} + 1}{x + 1}"),
    (r"\emptyset", r"\{\}"),
    (r"\mathbb{R}", r"(-\infty, \infty)"),
    (r"[-1, 0) \cup (0, 1]", r"[-1,0)\cup(0,1]"),
    (r"\left(-\infty, -\frac{1}{2}\right] \cup \left[\frac{1}{2}, \infty\right)", r"(-\infty,-\tfrac12]\cup[\tfrac12,\infty)"),
    (r"2^{2^{2}}", "16"),
    (r"2^{2^{2^{2}}}", "65536"),
    (r"2^{2^{10}}", r"2^{1024}"),
    (r"(2^{10})^{10}", r"2^{100}"),
    (r"{(2^{10})}^{100}", r"2^{1000}"),
    (r"10^{100}", r"10^{100}"),
    (r"2^{2023}", r"2 \cdot 2^{2022}"),
    (r"3^{10000}", r"9^{5000}"),
    (r"2^{1009} - 2^{505} + 1", r"1 + 2^{1009} - 2^{505}"),
    (r"7^{2010} \cdot 7", r"7^{2011}"),
    (r"2^{n} - 1", r"-1 + 2^{n}"),
    (r"n!", r"n!"),
    (r"(n+1)!", r"(n+1) \cdot n!"),
    (r"(3!)!", "720"),
    (r"100!", r"100 \cdot 99!"),
    (r"\frac{2023!}{2022!}", "2023"),
    (r"\binom{2022}{1011}", r"\frac{2022!}{(1011!)^2}"),
    (r"\binom{100}{50}", r"\binom{100}{50}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"e^{x^{2}}", r"e^{x^2}"),
    (r"e^{-\frac{x^2}{2}}", r"\exp(-x^2/2)"),
    (r"\frac{1}{\sqrt{2\pi}} e^{-x^2/2}", r"\frac{e^{-\frac{x^2}{2}}}{\sqrt{2\pi}}"),
    (r"\int_0^1 x^2 dx", r"\frac{1}{3}"),
    (r"\int_{0}^{\pi} \sin x \, dx", "2"),
    (r"\sum_{k=0}^{10} 2^k", "2047"),
    (r"\prod_{k=1}^{5} k", "120"),
    (r"\lim_{x \to 0} \frac{\sin x}{x}", "1"),
    (r"\frac{d}{dx} x^3", r"3x^2"),
    (r"\cos^2 x + \sin^2 x", "1"),
    (r"\tan\frac{\pi}{4}", "1"),
    (r"\sin 60^\circ", r"\frac{\sqrt{3}}{2}"),
    (r"\arctan 1", r"\frac{\pi}{4}"),
    (r"\log_{10} 1000", "3"),
    (r"\ln e^2", "2"),
    (r"\lfloor \pi \rfloor", "3"),
    (r"\lceil 2.1 \rceil", "3"),
    (r"\left| -3 \right| + 0", "3"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"1 - \frac{1}{2} + \frac{1}{3} - \frac{1}{4} + \frac{1}{5} - \frac{1}{6}", r"\frac{37}{60}"),
    (r"\frac{1}{1 + \frac{1}{1 + \frac{1}{1 + \frac{1}{1 + \frac{1}{2}}}}}", r"\frac{8}{13}"),
    (r"\sqrt{1 + \sqrt{2 + \sqrt{3 + \sqrt{4 + \sqrt{5}}}}}", r"\sqrt{1 + \sqrt{2 + \sqrt{3 + \sqrt{4 + \sqrt{5}}}}}+0"),
    (r"((((1+1)+1)+1)+1)", "5"),
    (r"\left(\left(\left(2\right)\right)\right)", "2"),
    (r"\begin{pmatrix} 1 & 2 & 3 \\ 4 & 5 & 6 \\ 7 & 8 & 9 \end{pmatrix}", r"\begin{pmatrix}1&2&3\\4&5&6\\7&8&9\end{pmatrix}"),
    (r"\begin{bmatrix} \frac{1}{2} & -\frac{\sqrt{3}}{2} \\ \frac{\sqrt{3}}{2} & \frac{1}{2} \end{bmatrix}",
     r"\begin{pmatrix} 1/2 & -\sqrt{3}/2 \\ \sqrt{3}/2 & 1/2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 0 & 0 & 0 \\ 0 & 1 & 0 & 0 \\ 0 & 0 & 1 & 0 \\ 0 & 0 & 0 & 1 \end{pmatrix}",
     r"\begin{pmatrix}1&0&0&0\\0&1&0&0\\0&0&1&0\\0&0&0&1\end{pmatrix}"),
    (r"\{(1,2), (2,1)\}", r"\{(2,1), (1,2)\}"),
    (r"(1,1), (2,3), (5,8), (13,21)", r"(1,1),(2,3),(5,8),(13,21)"),
    ("1, 2, 3, 4, 6, 8, 12, 24", "24, 12, 8, 6, 4, 3, 2, 1"),
    (", ".join(str(n) for n in range(1, 31)), ",".join(str(n) for n in range(30, 0, -1))),
    (" + ".join(str(n) for n in range(1, 31)), "465"),
    (r"3x^2 + 2y^2 - 5xy + 7x - 8y + 11 = 0", r"2y^2 + 3x^2 - 5xy + 7x - 8y + 11 = 0"),
    (r"\frac{x^2 + 2x + 1}{x + 1}", "x + 1"),
    (r"(x^2+1)(x^2-1)(x-3)(x+5)", r"(x^4-1)(x^2+2x-15)"),
    (r"\frac{-b \pm \sqrt{b^2 - 4ac}}{2a}", r"\frac{-b \pm \sqrt{b^2-4ac}}{2a}"),
    (r"2 + \sqrt{3}, 2 - \sqrt{3}", r"2 \pm \sqrt{3}"),
    (r"\frac{1 + i\sqrt{3}}{2}", r"\frac{1}{2} + \frac{\sqrt{3}}{2}i"),
    (r"x \in [0, 1]", r"[0, 1]"),
    (r"x \ge 2", r"[2, \infty)"),
    (r"f(x) = x^2", r"x^2"),
    (r"\text{(B)}", "B"),
    (r"\text{even}", "even"),
    ("12:30", "12:30 "),
    (r"90^\circ + 0", "90"),
    (r"3\frac{1}{2} + x", r"x + \frac{7}{2}"),
    (r"1.5 \times 10^{8} \text{ km} + 0", r"150000000"),
]  # fmt: skip
_UNEQUAL: list[Pair] = [
    (r"\frac{\sqrt{5} + 1}{2}", r"\frac{-1 + \sqrt{5}}{2}"),
    (r"x^2 + 1", r"x^2 - 1"),
    (r"[0, 1)", r"[0, 1]"),
    (r"\{1, 2\}", r"\{1, 3\}"),
    (r"(1, 2)", r"(2, 1)"),
    (r"2^{100}", r"2^{101}"),
    (r"2^{2023}", "18"),
    (r"10^{1000}", "18"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"\pi", r"\frac{22}{7}"),
    (r"\sqrt{2}", "1.41"),
    (r"\emptyset", r"\{0\}"),
    (r"\sin x", r"\cos x"),
    (r"x > 3", r"x \ge 3"),
    (r"n!", r"(n+1)!"),
    (r"52!", "18"),
    (r"\int_0^1 x dx", "18"),
]


# --- Poison ---------------------------------------------------------------------------------------------------------


def poison(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(kind, answer), the kinds in turn, each time with other sizes."""
    draw = random.Random(seed)
    kinds = list(_POISON.items())
    for i in range(count):
        kind, make = kinds[i % len(kinds)]
        yield kind, make(draw.choice([12, 40, 150, 600, 100_000]) + i, draw)


def _megabytes(n: int, draw: random.Random) -> str:
    return draw.choice(["1", "{", "x+", "\x00", "\\frac", "\u0661", "a ", "\\text{"]) * (40_000 * (1 + n % 25))


def _cut(text: str, n: int) -> str:
    """About `n` characters, but just as often as not within what graders look at."""
    return text[:1_990] if n < 10_000 else text


_POISON: dict[str, Callable[[int, random.Random], str]] = {
    "power tower": lambda n, draw: "^{".join([str(draw.randint(2, 99))] * (3 + n % 40)) + "}" * (2 + n % 40),
    "short power tower": lambda n, draw: f"{draw.randint(5, 99)}^{{{draw.randint(7, 99)}^{{{n}}}}}",
    "starred power tower": lambda n, draw: "**".join([str(draw.randint(5, 99))] * (4 + n % 30)),
    "bare power tower": lambda n, draw: "^".join([str(draw.randint(5, 99))] * (4 + n % 30)),
    "huge exponent": lambda n, draw: f"{draw.randint(2, 99)}^{{{'9' * (6 + n % 900)}}}",
    "huge exponent of x": lambda n, draw: f"(x+{draw.randint(1, 9)})^{{{'9' * (4 + n % 900)}}}",
    "huge scientific exponent": lambda n, draw: f"{draw.randint(1, 9)}e{'9' * (6 + n % 900)}",
    "huge exponent written out": lambda n, draw: f"{draw.randint(2, 9)} \\cdot 10^{{{10 ** (7 + n % 900)}}} + 1",
    "factorial": lambda n, draw: f"{10 ** (6 + n % 12) + n}!",
    "factorial tower": lambda n, draw: "(" * (2 + n % 40) + str(draw.randint(10, 99)) + "!)" * (2 + n % 40),
    "factorial call": lambda n, draw: f"factorial({10 ** (6 + n % 12)})",
    "binomial": lambda n, draw: f"\\binom{{{10 ** (7 + n % 12)}}}{{{10 ** (6 + n % 12) * draw.randint(2, 5)}}}",
    "deep braces": lambda n, draw: _cut("{" * n + "1" + "}" * n, n),
    "deep parentheses": lambda n, draw: _cut("(" * n + "1+1" + ")" * n, n),
    "deep brackets": lambda n, draw: _cut("[" * n + "x" + "]" * n, n),
    "deep roots": lambda n, draw: _cut("\\sqrt{1+" * n + "2" + "}" * n, n),
    "fraction tower": lambda n, draw: _cut("\\frac{1}{1+" * n + "x" + "}" * n, n),
    "fraction tower upwards": lambda n, draw: _cut("\\frac{" * n + "1" + "}{x}" * n, n),
    "deep functions": lambda n, draw: _cut("\\sin(\\cos(" * n + "x" + "))" * n, n),
    "deep absolute values": lambda n, draw: _cut("|" * n + "x-1" + "|" * n, n),
    "deep sets": lambda n, draw: _cut("\\{" * n + "1,2" + "\\}" * n, n),
    "unbalanced braces": lambda n, draw: "{" * (n * 3) + "18",
    "unbalanced the other way": lambda n, draw: "18" + "}" * (n * 3),
    "megabytes": _megabytes,
    "unicode digits": lambda n, draw: "".join(chr(0x0660 + draw.randint(0, 9)) for _ in range(1 + n % 1_500)),
    "mixed digits": lambda n, draw: "1" + "".join(chr(0xFF10 + draw.randint(0, 9)) for _ in range(1 + n % 60)) + "+\u00b2",
    "null bytes": lambda n, draw: "\x00".join("18" * (1 + n % 200)),
    "lone surrogates": lambda n, draw: "18" + chr(0xD800 + n % 2048) * (1 + n % 300),
    "right to left": lambda n, draw: "\u202e81\u202c \u05d0\u05d1 18" * (1 + n % 100),
    "control characters": lambda n, draw: "\x1b[2J\x1b]0;18\x07\x08\r" * (1 + n % 100) + str(n),
    "combining marks": lambda n, draw: "1" + "\u0301" * (1 + n % 1_900) + "8",
    "long polynomial": lambda n, draw: _cut("+".join(f"x^{{{i}}}" for i in range(20 + n % 5_000)), n),
    "long product": lambda n, draw: _cut("".join(f"(x+{i})" for i in range(30 + n % 5_000)), n),
    "long sum of roots": lambda n, draw: _cut("+".join(f"\\sqrt{{{i}}}" for i in range(40 + n % 5_000)), n),
    "many variables": lambda n, draw: "(" + "+".join("abcdefghjklmnopqrstuvwxyz"[: 10 + n % 15]) + f")^{{{50 + n % 900}}}",
    "long list": lambda n, draw: _cut(",".join(f"{i}x" for i in range(150 + n % 5_000)), n),
    "big matrix": lambda n, draw: _cut(
        "\\begin{pmatrix}" + "\\\\".join("&".join("x" * (20 + n % 40)) for _ in range(20 + n % 40)), n
    ) + "\\end{pmatrix}",
    "matrix power": lambda n, draw: f"\\begin{{pmatrix}}1&2\\\\3&4\\end{{pmatrix}}^{{{10 ** (5 + n % 9)}}}",
    "integral": lambda n, draw: f"\\int_0^{{{n}}} \\frac{{x^{{{n}}} \\sin(x^3) e^{{x^2}}}}{{\\sqrt{{x^5+{n}}}}} dx",
    "integrals in integrals": lambda n, draw: _cut("\\int_0^1 " * n + "e^{xy} " + "dx " * n, n),
    "sum": lambda n, draw: f"\\sum_{{k=1}}^{{{10 ** (6 + n % 12)}}} \\frac{{1}}{{k^{{{2 + n % 7}}}+k!}}",
    "product": lambda n, draw: f"\\prod_{{k=1}}^{{{10 ** (6 + n % 12)}}} (k^2+{n})",
    "sums in sums": lambda n, draw: _cut("\\sum_{i=1}^{999} " * n + "i", n),
    "limit": lambda n, draw: f"\\lim_{{x \\to 0}} \\frac{{\\sin^{{{n}}}(\\tan(x))-x^{{{n}}}}}{{x^{{{n + 2}}}}}",
    "derivative": lambda n, draw: f"\\frac{{d^{{{n}}}}}{{dx^{{{n}}}}} \\sin(\\cos(\\tan(e^{{x^2}})))",
    "words": lambda n, draw: _cut("apples and oranges " * n, n),
    "words and a digit": lambda n, draw: _cut("a b" * n + " 7", n),
    "letters": lambda n, draw: "".join(draw.choice("abcdfghjklmnpqrstuvwxyz") for _ in range(20 + n % 1_900)),
    "number and units": lambda n, draw: _cut("18 kg 3 m " * n, n),
    "equals signs": lambda n, draw: _cut("x=" * n + "18", n),
    "equal sums": lambda n, draw: _cut("=".join("9+9" for _ in range(n)), n),
    "commas": lambda n, draw: _cut("1,000," * n + "00", n),
    "spaced digits": lambda n, draw: _cut("1 " * n, n),
    "dollars": lambda n, draw: _cut("$\\$" * n + "18", n),
    "text commands": lambda n, draw: _cut("\\text{" * n + "18" + "}" * n, n),
    "backslashes": lambda n, draw: _cut("\\" * n + "18", n),
    "minus signs": lambda n, draw: "-" * (20 + n % 1_900) + "18",
    "boxes": lambda n, draw: _cut("\\boxed{" * n + "9*2" + "}" * n, n),
    "left without right": lambda n, draw: _cut("\\left(" * n + "18", n),
    "carets": lambda n, draw: "x" + "^" * (5 + n % 900) + "2",
    "subscripts": lambda n, draw: _cut("x_{" * n + "1" + "}" * n, n),
    "huge decimal": lambda n, draw: f"\\sqrt{{{'7' * (100 + n % 1_800)}.{n}}}",
    "huge fraction": lambda n, draw: f"\\sqrt{{\\frac{{{'7' * (100 + n % 850)}}}{{{'3' * (90 + n % 850)}}}}}",
    "huge modulus": lambda n, draw: f"{draw.randint(2, 9)}^{{{10 ** (7 + n % 20)}}} \\bmod {n}",
    "huge prime": lambda n, draw: f"\\sqrt{{{(2**127 - 1) * (2**521 - 1) ** (1 + n % 2) + 2 * n}}}",
    "nested logarithms": lambda n, draw: f"\\log_{{2}}({9 ** (100 + n % 1_500)}) + \\log_{{3}}({8 ** (100 + n % 500)})",
    "trigonometry": lambda n, draw: _cut("+".join(f"\\sin^{{{i}}}({i}x)\\cos({i}x)" for i in range(5, 8 + n % 60)), n),
    "radicals to simplify": lambda n, draw: f"(\\sqrt{{2}}+\\sqrt{{3}}+\\sqrt{{5}}+\\sqrt{{7}})^{{{20 + n % 300}}}",
    "Gamma": lambda n, draw: f"\\Gamma({10 ** (6 + n % 9)})",
    "greatest common divisor": lambda n, draw: f"\\gcd({10 ** (900 + n % 900)}!, {10**7}!)",
    "repeating decimal": lambda n, draw: f"0.\\overline{{{'7' * (4 + n % 900)}}}+x",
    "percent of a tower": lambda n, draw: f"9^{{9^{{{n}}}}}\\%",
}  # fmt: skip

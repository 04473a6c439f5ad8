r"""Read the unit behind a number: ` km/h`, `m^2`, ` apples per day`, `^\circ C`. None where it is not known to be one.

    " kilometers per hour" --read_unit--> 5/18, length/time          " thirds" --read_unit--> None

Two kinds of words are units: those of `_TABLE`, with dimension and factor, and counted nouns (`apples`, `red marbles`,
`people`), which are a dimension of their own. A counted noun has to be a plural, and no phrase may have a word that
changes the value or takes it back: numerals, fractions, `squared`, `or`, `than`, `below`.

A library of units (pint) was tried and left: it takes a second or more to import, reads `cats` as a
pressure, `a` as a year and `6 am` as attometers, and knows neither dollars nor any counted noun.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_UNIT_CHARS = 100
"""A longer phrase is prose."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A factor to the base unit of its dimensions, which are pairs of name and exponent, sorted.

    Example:
        >>> read_unit("km/h")
        Unit(factor=Fraction(5, 18), dimensions=(('length', 1), ('time', -1)))
    """

    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]


NO_UNIT = Unit(Fraction(1), ())

# Dimension, factor, names. `[kM]W` is written as kW and MW too, `[*]watt` as kilowatt and so on. Not `pm` and `am` of meters,
# which are times of the day; `ML` and `KG` are sloppy `ml` and `kg`. A name of up to three letters is a symbol, and has no
# plural unless it is listed. Case counts where two symbols differ by nothing else.
_TABLE = """
length 1 [kdcmµμn]m [*]meter [*]metre; length 1000 kms; length 0.01 cms; length 0.0254 in inch inches; length 0.3048 ft foot feet
length 0.9144 yd yds yard; length 1609.344 mi mile; length 1852 nmi; length 9460730472580800 ly light-year lightyear
length^2 4046.8564224 acre; length^2 10000 ha hectare; length^2 0.09290304 sqft; length^2 0.00064516 sqin
length^3 0.001 [dcmµμ]l [dcmµμ]L [*]liter [*]litre ltr; length^3 0.000001 cc; length^3 0.003785411784 gal gallon
length^3 0.000946352946 qt quart; length^3 0.000473176473 pt pint; length^3 0.0002365882365 cup
length^3 0.0000147867647815625 tbsp tablespoon; length^3 0.00000492892159375 tsp teaspoon; length^3 0.0000295735295625 floz
mass 0.001 [kmµμ]g [*]gram [*]gramme gm gms; mass 1000 tonne; mass 907.18474 ton; mass 0.000001 mcg; mass 1 kgs kilo
mass 0.45359237 lb lbs pound £ quid; mass 0.028349523125 oz ounce
time 1 [mµμn]s sec secs [*]second; time 60 min mins minute; time 3600 h hr hrs hour; time 86400 day; time 604800 wk wks week
time 1209600 fortnight; month 1 month mo mos; month 12 yr yrs year; month 120 decade; month 1200 century centuries
length/time 0.44704 mph; length/time 5/18 kph kmph kmh
money 1 dollar $ USD buck; money 0.01 cent ¢ penny pennies; euro 1 euro € EUR; yen 1 yen ¥ JPY; rupee 1 rupee ₹ INR Rs
angle 1 ° degree deg; radian 1 rad radian; celsius 1 °C celsius centigrade; fahrenheit 1 °F fahrenheit; kelvin 1 kelvin
force 1 [k]N [*]newton; energy 1 [kM]J [*]joule; energy 3600 Wh; energy 3600000 kWh; calorie 1 cal [*]calorie
calorie 1000 kcal; power 1 [kMGm]W [*]watt; current 1 [m]A [*]amp ampere; voltage 1 [km]V [*]volt; resistance 1 Ω ohm
pressure 1 [kM]Pa [*]pascal; frequency 1 [kMG]Hz [*]hertz; amount 1 [m]mol [*]mole
data 1 [*]byte; data 1000 kB KB; data 1000000 MB; data 1000000000 GB; data 1000000000000 TB; data 1/8 [*]bit
am 1 am; pm 1 pm; o'clock 1 o'clock; dozen 1 dozen
"""
_LETTERS = {
    "k": "1e3",
    "M": "1e6",
    "G": "1e9",
    "d": "0.1",
    "c": "0.01",
    "m": "1e-3",
    "µ": "1e-6",
    "μ": "1e-6",
    "n": "1e-9",
}
_WORDS = {"kilo": "1e3", "mega": "1e6", "giga": "1e9", "hecto": "100", "deci": "0.1", "centi": "0.01", "milli": "1e-3",
          "micro": "1e-6", "nano": "1e-9"}  # fmt: skip


def _powers(text: str) -> Iterator[tuple[str, int]]:
    for sign, part in enumerate(text.split("/")):
        name, _, power = part.partition("^")
        yield name, int(power or 1) * (-1 if sign else 1)


def _read_table() -> dict[str, Unit]:
    known: dict[str, Unit] = {}
    for entry in re.split("[;\n]", _TABLE.strip()):
        dimensions, factor, *names = entry.split()
        for name in names:
            letters, _, base = name.rpartition("]")
            prefixes = _WORDS if letters == "[*" else {letter: _LETTERS[letter] for letter in letters[1:]}
            for prefix, scale in {"": "1", **prefixes}.items():
                known[prefix + base] = Unit(Fraction(factor) * Fraction(scale), tuple(_powers(dimensions)))
    plurals = {name + "s": unit for name, unit in known.items() if len(name) > 2 and not name.endswith("s")}
    known = plurals | known
    # Single letters keep their case: `M` and `S` are no units, and `K` is as often a thousand.
    return {name.lower(): unit for name, unit in known.items() if len(name) > 1} | known


_KNOWN = _read_table()
_DIMENSIONS = {name for unit in _KNOWN.values() for name, _ in unit.dimensions}

_DEGREE = re.compile(r"\^ ?\{? ?(?:\\circ|°) ?\}?|\\degree(?:s|(?![A-Za-z]))|\\deg(?![A-Za-z])|[º˚]")
_TEMPERATURE = re.compile(r"(?:°|\bdegrees?\b|\bdeg\b) ?(C(?:elsius)?|F(?:ahrenheit)?|centigrade)\b", re.IGNORECASE)
_FLUID = re.compile(r"\b(?:fl|fluid) (?:oz|ounces?)\b", re.IGNORECASE)
_POWER_WORD = re.compile(r" (squared|cubed)\b", re.IGNORECASE)
_PER = re.compile(r" ?/ ?| ?\bper |(?:^| )(?:an|a|each|every) (?=[A-Za-z])", re.IGNORECASE)
_REFUSED = re.compile(  # Words that go on counting, change the value, or take it back.
    r"\b(?:or|and|plus|minus|not|no|to|by|over|mod|choose|is|than|below|under|negative|less than|short of|"
    r"half|halves|quarter|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|elevenths?|twelfths?|"
    r"[a-z]+(?:teen|tie)ths?|hundredths?|[a-z]+illionths?|thousandths?|one|two|three|four|five|six|seven|eight|nine|ten|"
    r"eleven|twelve|[a-z]+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|tens|zeros?|zeroes|hundreds?|"
    r"thousands?|[mbtr]+illions?|percent|squared|cubed|squares|cubes|roots?|factorials?|pi|once|twice|thrice|doubled?|"
    r"doubles|tripled?|triples|gross|scores?|halfs|plus|yes|this|thus|was|has|does|divides|equals)\b",
    re.IGNORECASE,
)
_QUALIFIER = re.compile(  # From here on a phrase says of what, where or when, and not what is counted.
    r"(?:^| )(?:of|in|for|on|at|from|with|who|that|left|remaining|total|altogether|overall|away|apart|each|every|ago|later|"
    r"earlier|old|long|tall|wide|high|deep|thick|heavy|late|early|more|extra|additional|less|fewer|longer|older|younger|"
    r"taller|heavier|faster|again)(?= |$)",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"^(?:more|additional|extra|other|different|whole|full|total|of the|of|less|fewer|u\.?s\.?)(?: |$)", re.I
)
_ATOM = re.compile(
    r"(?:(?P<shape>square|sq|cubic|cu) )?(?P<name>[A-Za-zµμΩ°'$€£¥₹¢-]+?)(?: ?\^? ?\{? ?(?P<power>[23]) ?\}?)?(?:$| |·|\*)",
    re.IGNORECASE,
)
_SHAPES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_NOUNS = re.compile(r"[A-Za-z][A-Za-z'\u2019-]*(?: [A-Za-z][A-Za-z'\u2019-]*)*")
_PLURAL = re.compile(
    r"(?:[a-z'\u2019-]+(?<![sui])s|[a-z'\u2019-]+(?:ies|buses|viruses)|(?:[a-z-]*(?:wo)?men|[a-z-]*children|people|mice|geese|teeth|"
    r"[a-z-]*fish|sheep|deer|oxen|cattle|dice|[a-z-]*feet|shrimp|aircraft))",
    re.IGNORECASE,
)
_STEMS = ((re.compile(r"\bpeople\b"), "person"), (re.compile(r"men\b"), "man"), (re.compile(r"children\b"), "child"),
          (re.compile(r"(?:ies|y)\b"), "i"), (re.compile(r"[es]+\b"), ""))  # fmt: skip
"""Singular and plural have one stem: `apple` and `apples`, `box` and `boxes`. It is compared and never shown."""


@lru_cache(maxsize=1024)
def read_unit(text: str, *, single: bool = False) -> Unit | None:
    r"""What a cleaned text behind a number means, or None. `single`: the number is at most one, as in `1 apple`.

    Example:
        >>> read_unit(" meters squared") == read_unit("m^2")
        True
        >>> read_unit(" thirds")
    """
    if len(text) > MAX_UNIT_CHARS:
        return None
    glued = not text.startswith(" ")
    text = _DEGREE.sub("°", text).strip().replace("(s)", "s").replace(".", "")
    text = _TEMPERATURE.sub(lambda match: "°" + match[1][0].upper(), text).replace("° ", "°")
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    text = _FLUID.sub("floz", text)
    text = _POWER_WORD.sub(lambda match: "^2" if match[1].lower() == "squared" else "^3", text)
    if _REFUSED.search(text):
        return None
    top, *bottoms = _PER.split(text)
    parts = [(_read_phrase(top.strip(), single=single, glued=glued), 1)]
    parts += [(_read_phrase(bottom.strip(), single=True, glued=False), -1) for bottom in bottoms]
    return _product(parts)


def _product(parts: list[tuple[Unit | None, int]]) -> Unit | None:
    """Of units to their powers; None where one of them is None."""
    factor, counts = Fraction(1), Counter[str]()
    for unit, power in parts:
        if unit is None:
            return None
        factor *= unit.factor**power
        counts.update({name: exponent * power for name, exponent in unit.dimensions})
    return Unit(factor, tuple(sorted((name, power) for name, power in counts.items() if power)))


def _read_phrase(phrase: str, *, single: bool, glued: bool) -> Unit | None:
    phrase = _LEADING.sub("", phrase)
    known = _read_known(phrase)  # First: `in` is an inch where it stands alone.
    if known is None and not glued and (qualifier := _QUALIFIER.search(phrase)):
        phrase = phrase[: qualifier.start()]
        known = _read_known(phrase)
    if known is not None or glued:
        return known
    words = phrase.split(" ")
    if not _NOUNS.fullmatch(phrase) or not ((single and len(words[-1]) > 2) or _PLURAL.fullmatch(words[-1])):
        return None
    label = phrase.casefold()
    for pattern, stem in _STEMS:
        label = pattern.sub(stem, label)
    return Unit(Fraction(1), ((label, 1),))


def _read_known(phrase: str) -> Unit | None:
    """The product of the units of `phrase`, where each of them is in the table."""
    parts: list[tuple[Unit | None, int]] = []
    place = 0
    while place < len(phrase):
        atom = _ATOM.match(phrase, place)
        if not atom:
            return None
        name = atom["name"]
        unit = _KNOWN.get(name) or (_KNOWN.get(name.lower()) if len(name) > 1 else None)
        parts.append((unit, int(atom["power"] or 1) * _SHAPES.get((atom["shape"] or "").lower(), 1)))
        place = atom.end()
    return _product(parts)


def agree(first: Unit, second: Unit) -> bool:
    """Whether the two have the same dimensions, or one of them has none. Plain degrees may be of either temperature."""
    dimensions = {first.dimensions, second.dimensions}
    if len(dimensions) == 1 or () in dimensions:
        return True
    return (("angle", 1),) in dimensions and bool(dimensions & {(("celsius", 1),), (("fahrenheit", 1),)})


def same_unit(first: Unit, second: Unit) -> bool:
    """`agree`, and of the same size where both have dimensions."""
    return agree(first, second) and (first.factor == second.factor or not first.dimensions or not second.dimensions)


_UNIT_BEHIND = re.compile(
    r"(?:(?<=[0-9)}\]!])(?: (?=\S)|(?=[\^°]))|(?<=\\pi) (?=[A-Za-z]{2}|m ?\^))"
    r"(?P<unit>[^0-9\\(){}=]{1,40}(?:\^? ?\{? ?[23] ?\}?)?|\^ ?\{? ?\\circ ?\}?)\Z"
)


def split_unit(answer: str) -> tuple[str, Unit]:
    r"""`answer`, an expression, without the unit of the table behind it, and that unit.

    Example:
        >>> split_unit(r"3\sqrt{2} km")
        ('3\\sqrt{2}', Unit(factor=Fraction(1000, 1), dimensions=(('length', 1),)))
    """
    match = _UNIT_BEHIND.search(answer)
    unit = match and read_unit(" " + match["unit"])
    if match and unit and unit.dimensions and all(name in _DIMENSIONS for name, _ in unit.dimensions):
        return answer[: match.start()].rstrip(), unit
    return answer, NO_UNIT

r"""Is an answer right? Exact arithmetic where both sides are numbers, math-verify in a killable process where not.

    prediction, target --(a) same text--> right
                       --(b) both numbers: exact, with Fraction--> right or wrong
                       --(c) one cannot be what the other is--> wrong
                       --(d) its structure is hopeless for algebra--> a failure
               --(e) math-verify, in a worker process under a hard deadline--> right, wrong, or a failure

What counts as a number, and as the same one (these rules are ours, not math-verify's):
- `18`, `+18`, `18.`, `18.00`, `1.8e1`, `1.8 \times 10^1`, `36/2`, `\frac{36}{2}` and `17 2/2` are 18; `.5` is `1/2`.
  So are full-width digits; `½` is `1/2`, `0.\overline{6}` is `2/3`, and an en dash can be a minus.
  Values are compared exactly: `0.333` is not `1/3`, and `1/2^{81}` not `1/2^{80}`. `\approx 33` says 33.
- Wrappings do not matter: `$18$`, `\(18\)`, `{18}`, `\text{18}`, `\boxed{18}`, `**18**`.
- Commas and spaces group thousands only by exactly three digits: `1,000`, `1{,}000`, `1\,000`, `1 000`. `1,00` and `17 18`
  are no numbers, and never equal to one.
- Where exactly one side has a percent sign, it may count or not: `18%` is `0.18`, and it is `18`. Where both have one, the
  numbers are compared.
- `18 hundred` to `18 trillion` are multiplied out. What else is behind a number has to be a unit (`ludic.task.units`): of
  physics or money (`18 km/h`, `18\text{ m}^2`, `18ml`, `18^\circ`, `$18`, `18 €`), or a counted noun (`18 apples per day`),
  as `dozen` is. Words that change the value are none (`2 thirds`, `5 squared`, `3 tens`). Units matter only if both sides
  have one: then dimension and size have to agree, and `3 km` is `3000 m`. Other letters are variables: `18x` is not 18.
- A name before `=` or `:` is dropped (`x = 18`, `Total: 18`), again unless both sides have one and they differ. In a
  chain like `9 \times 2 = 18` every side has to equal the target.

What it leaves out: partial credit, and judging prose (`I think 18` is wrong). A failure of the grader is never a mere
False: it is in the `Verdict`, in the counters and in the log. Any answer may be meant to do harm: (a) to (d) look at a
bounded piece of it, once; (e) has limits on time and memory (`ludic.task.grading_worker`).
"""

import asyncio
import logging
import math
import re
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ludic.task.answer_cost import cost
from ludic.task.grading_pool import GradingPool, Question, Reply
from ludic.task.numbers import ABOUT, MAX_ANSWER_CHARS, Number, clean_answer, is_broken_number, read_number, same_number
from ludic.task.parsers import closing_brace
from ludic.task.units import same_unit, split_unit

logger = logging.getLogger(__name__)

QUICK_S = 0.25
"""CPU seconds after which an answer leaves the quick lane; nearly all need less than a tenth of that."""

MATCH_LIMIT_S = 5.0
"""How long one call of `answers_match` may block, by the clock."""

Failure = Literal["timeout", "crash", "too_long", "too_complex"]
"""`timeout`: math-verify met its deadline. `crash`: it ran out of memory or stack, or died. `too_long`: more than
`MAX_ANSWER_CHARS` characters. `too_complex`: so big or deep (`ludic.task.answer_cost`) that math-verify was not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of grading one answer. `matched` is False wherever `failure` is set.

    Example:
        >>> Verdict(matched=False, failure="timeout")
        Verdict(matched=False, failure='timeout')
    """

    matched: bool
    failure: Failure | None = None


# --- Exact rules, in this process -----------------------------------------------------------------------------------

_INTEGER = re.compile(r"-?[1-9][0-9]{0,17}")
_WORDS_ONLY = re.compile(r"[A-Za-z\s.,:;?!'\"_]*")
_TWO_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]++ [A-Za-z]{2}")
_DIGIT = re.compile(r"[0-9]")
_RELATION = re.compile(r"[<>≤≥≠]|!=|\\(?:leq?|geq?|neq?|lt|gt|equiv)(?![A-Za-z])")
_NUMBER_AND_WORDS = re.compile(r"[-+]?[0-9][0-9.,/ ]*+[A-Za-z°][A-Za-z°'. -]*+")
"""Where `read_number` refused the words, no algebra makes a number of them."""
_PERCENT_BEHIND = re.compile(r" ?\\?%\Z")


def _decide(prediction: str, target: str) -> Verdict | Question:
    """The verdict as far as it takes no algebra, else the question for math-verify."""
    prediction, target = prediction.strip(), target.strip()
    if max(len(prediction), len(target)) > MAX_ANSWER_CHARS:
        return Verdict(matched=False, failure="too_long")
    if not prediction or not target:
        return Verdict(matched=False)
    if prediction == target:
        return Verdict(matched=True)
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(target):
        return Verdict(matched=False)  # Without leading zeros, another text is another number.
    prediction, target = clean_answer(prediction), clean_answer(target)
    if prediction == target:
        return Verdict(matched=True)
    expected = read_number(target)
    given = read_number(prediction)
    if expected is not None and given is not None:
        return Verdict(matched=same_number(given, expected))
    # A box of our own is put around the answer for math-verify: what closes it early, or never, is no answer.
    if closing_brace("{" + prediction + "}", 0) != len(prediction) + 1:
        return Verdict(matched=False)
    if expected is None or expected.value is None:
        return _compare_by_algebra(prediction, target)
    return _compare_with_number(prediction, expected)


def _compare_by_algebra(prediction: str, target: str) -> Verdict | Question:
    """The target is not a number. A percent sign or unit at the end is compared here: math-verify drops what it likes."""
    (prediction, unit), (target, expected_unit) = split_unit(prediction), split_unit(target)
    if ("%" in prediction) != ("%" in target):
        prediction, target = _PERCENT_BEHIND.sub("", prediction), _PERCENT_BEHIND.sub("", target)
    if not same_unit(unit, expected_unit) or ("%" in prediction) != ("%" in target):
        return Verdict(matched=False)
    return _question((prediction,), target)


def _compare_with_number(prediction: str, expected: Number) -> Verdict | Question:
    """`prediction` is no number by itself; may it still be equal to one?"""
    if _RELATION.search(prediction) or _is_prose(prediction):
        return Verdict(matched=False)
    # `100/3 \\approx 33` says 33: what stands before the last such sign was rounded.
    sides = [part.strip() for part in ABOUT.split(prediction)[-1].split("=")]
    values = [side for side in sides if not _WORDS_ONLY.fullmatch(side)]
    questions = []
    for side in values:
        number = read_number(side)
        if number is None and not is_broken_number(side) and not _NUMBER_AND_WORDS.fullmatch(side):
            side, unit = split_unit(_PERCENT_BEHIND.sub("", side))
            if "%" in side or not same_unit(unit, expected.unit):
                return Verdict(matched=False)
            questions.append(side)
        elif number is None or not same_number(number, expected):
            return Verdict(matched=False)
    if questions:
        assert expected.value is not None
        return _question(tuple(questions), str(expected.value * (100 if expected.percent else 1)))
    return Verdict(matched=bool(values))


def _is_prose(prediction: str) -> bool:
    """Two plain words before a digit. math-verify would multiply out their letters, and never reach a number."""
    digit = _DIGIT.search(prediction[::-1])
    return digit is not None and _TWO_WORDS.search(prediction, 0, len(prediction) - digit.end()) is not None


def _question(predictions: tuple[str, ...], target: str) -> Verdict | Question:
    dear = sum(map(cost, predictions))
    if math.isinf(dear):
        return Verdict(matched=False, failure="too_complex")
    return Question(predictions=predictions, target=target, cost=dear)


# --- math-verify, in other processes --------------------------------------------------------------------------------


class Grader:
    """Grades answers, with `num_workers` math-verify processes that start when the first answer needs one.

    An answer that takes longer than `timeout_s` CPU seconds of its worker is given up; twice that by the clock ends it in any
    case. So is one that takes longer than `QUICK_S` while many such wait: those may wait `2 * timeout_s` seconds. Use it from
    any thread and any event loop. Close it when done; what is left open is closed at exit, or with the parent's death.

    Raises RuntimeError where workers cannot start, and after `close`.
    """

    def __init__(self, num_workers: int = 2, timeout_s: float = 5.0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be more than 0 seconds, not {timeout_s}")
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.num_graded = 0
        """All verdicts, failures included."""
        self.failures = Counter[Failure]()
        self._lock = threading.Lock()
        self._pool = GradingPool(num_workers=num_workers, timeout_s=timeout_s, quick_s=min(QUICK_S, timeout_s))
        self._finalizer = weakref.finalize(self, self._pool.close)

    async def match(self, prediction: str, target: str) -> Verdict:
        """Whether `prediction` is as good as `target`, by the rules at the top of this module."""
        decision = _decide(prediction, target)
        if isinstance(decision, Question):
            decision = _verdict(await asyncio.wrap_future(self._pool.ask(decision)))
        return self._count(decision, prediction)

    def match_sync(self, prediction: str, target: str) -> Verdict:
        """`match` for callers without an event loop; blocks."""
        decision = _decide(prediction, target)
        if isinstance(decision, Question):
            decision = _verdict(self._pool.ask(decision).result())
        return self._count(decision, prediction)

    async def aclose(self) -> None:
        """`close`, without holding up the event loop."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the workers now. Answers that are still waiting raise RuntimeError. Safe to call twice."""
        self._finalizer()

    def _count(self, verdict: Verdict, prediction: str) -> Verdict:
        with self._lock:
            self.num_graded += 1
            if verdict.failure is None:
                return verdict
            self.failures[verdict.failure] += 1
            count = self.failures.total()
        if (
            count <= 20 or count % 100 == 0
        ):  # A policy that has taken to hostile answers must not fill the log with them.
            logger.warning(
                "the grader gave up on an answer (%s, number %d): %.80r", verdict.failure, count, prediction[:80]
            )
        return verdict


def _verdict(reply: Reply) -> Verdict:
    return Verdict(matched=reply) if isinstance(reply, bool) else Verdict(matched=False, failure=reply)


@cache
def _default_grader() -> Grader:
    return Grader(timeout_s=MATCH_LIMIT_S / 2)  # Twice its `timeout_s` ends an answer by the clock.


def answers_match(prediction: str, target: str) -> bool:
    r"""Whether `prediction` is as good as `target`, by the rules at the top of this module.

    For scripts and tests: it shares one `Grader`. A failure is False, and logged as a warning. It blocks for at most
    `MATCH_LIMIT_S` seconds by the clock; the first answer that needs math-verify also waits for it to start (one or two
    seconds of CPU), and answers that hang in other threads at the same time wait for one another.

    Example:
        >>> answers_match(r"\$1,000.00", "1000"), answers_match("18 km", "18 m")
        (True, False)
    """
    return _default_grader().match_sync(prediction, target).matched

r"""Coverage-guided fuzzing of the grader: the exact rules, the guess of the cost, and now and then the real workers.

    pip install atheris; python tests/fuzz/fuzz_grader.py -max_total_time=600 -max_len=512 [libFuzzer's arguments]

The input, decoded as in `fuzz_parsers.py`, is a prediction and a target, parted by the first line break; a first byte of
`!` puts the pair to a real `Grader` too, which takes a thousand times as long. A finding is an exception: something
raised, an invariant of `check_pair` broke, 4 KB took more than a second in this process, or a worker missed its
deadline. `tests/test_faults_grader.py` tries `check_pair` on drawn inputs, and keeps what was found.
"""

import logging
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ludic.task.grading import Grader

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

LIMIT_S = 1.0
"""CPU time for all properties of one input in this process."""
WORKER_TIMEOUT_S = 0.5
SEEDS = (
    "!9*2\n18",
    "!(x+1)^{100}\n2^{2^{10}}",
    "x = 9 \\times 2 = 18\n18",
    "\\frac{1}{1+\\frac{1}{\\sqrt{x}}}\n1/2",
    "\\binom{10}{5} + \\sum_{k=1}^{10} k! / 9^{9^{9}}\n1,000",
    "[0, \\infty) \\cup \\{1, 2\\}\n18 or 20",
    "18 hundred million %\n\\$5 = y",
    "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{2}\n\\pm 2",
)


def check_pair(prediction: str, target: str, grader: "Grader | None" = None) -> None:
    """Raises where a promise about grading `prediction` is broken. With a `grader`, what algebra there is is done."""
    from ludic.task.answer_cost import cost
    from ludic.task.grading import _decide
    from ludic.task.grading_pool import Question
    from ludic.task.numbers import MAX_ANSWER_CHARS

    start = time.thread_time()
    length = max(len(prediction.strip()), len(target.strip()))
    decision = _decide(prediction, target)
    guess = cost(prediction)
    assert guess >= 0.0
    assert _decide(prediction, target) == decision
    if isinstance(decision, Question):
        assert length <= MAX_ANSWER_CHARS
        assert decision.predictions
        assert math.isfinite(decision.cost)
    else:
        assert not (decision.matched and decision.failure)
        assert (decision.failure == "too_long") == (length > MAX_ANSWER_CHARS)
    same = _decide(prediction, prediction)
    if prediction.strip() and len(prediction.strip()) <= MAX_ANSWER_CHARS:
        assert not isinstance(same, Question)
        assert same.matched, "an answer does not match itself"
    seconds = time.thread_time() - start
    assert seconds < LIMIT_S or length > 4_096, f"{length} characters took {seconds:.2f} s"
    if grader is not None:
        begun = time.monotonic()
        verdict = grader.match_sync(prediction, target)
        assert not (verdict.matched and verdict.failure)
        # A deadline is CPU time, twice that by the clock; the rest is for a busy machine.
        assert time.monotonic() - begun < 4 * WORKER_TIMEOUT_S + 10.0


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["ludic"]):
        import ludic.task.grading

    from tests.fuzz import start
    from tests.fuzz.fuzz_parsers import decode

    logging.disable(logging.CRITICAL)
    grader = ludic.task.grading.Grader(num_workers=1, timeout_s=WORKER_TIMEOUT_S)
    grader.match_sync("(9*2)", "18")  # From here on its workers are up.

    def check(data: bytes) -> None:
        prediction, _, target = decode(data.removeprefix(b"!")).partition("\n")
        check_pair(prediction, target, grader if data.startswith(b"!") else None)

    start([seed.encode() for seed in SEEDS], check)


if __name__ == "__main__":
    main()

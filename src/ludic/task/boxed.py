r"""The score of a text whose answer is in the last `\boxed{...}`, as tasks of mathematics share it."""

from ludic.task.grading import Grader, Verdict
from ludic.task.parsers import boxed_parser, last_number_parser
from ludic.types import Score


async def boxed_score(grader: Grader, text: str, target: str, *, last_number: bool) -> Score:
    """1.0 if the boxed answer is right, else 0.0.

    `parts` has `grader_failed`, 1 where the grader gave up on the answer, for whatever reason, and `grader_timeout`, 1 where
    that was because math-verify met its deadline. With `last_number`, for tasks whose answers are numbers, it also has the
    verdicts of two rules: `strict`, that of the box, and `flexible`, by which the last number counts where there is no box.
    """
    boxed = boxed_parser(text)
    answer = boxed.answer
    if answer is None and last_number:
        answer = last_number_parser(text).answer
    # Both rules compare the same answer with the target, where both have one: one grading serves them.
    verdict = Verdict(matched=False) if answer is None else await grader.match(answer, target)
    strict = verdict.matched and boxed.answer is not None
    rules = {"strict": float(strict), "flexible": float(verdict.matched)} if last_number else {}
    failures = {
        "grader_failed": float(verdict.failure is not None),
        "grader_timeout": float(verdict.failure == "timeout"),
    }
    return Score(reward=float(strict), correct=strict, parse=boxed, parts=rules | failures)

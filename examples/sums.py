"""A task of one's own with everything that the GSM8K script has: every flag, resume, checkpoints, summary, picture, table.

    uv run python examples/sums.py --model MODEL --engine local --max-seq-len 96 --micro-token-budget 1024 --train-steps 20

The first part is the task, the second the script. `eval_sums.py` evaluates the same task.
"""

import argparse
import random
from dataclasses import dataclass

from ludic import ChatMessage, Score, last_number_parser
from ludic.cli import run_script
from ludic.config_file import RunParser
from ludic.flags import add_run_arguments
from ludic.run.task import Samples, Task
from ludic.run.training import train_from_flags


@dataclass(frozen=True)
class Sum:
    """One problem."""

    a: int
    b: int


class Sums:
    """The environment (`ludic.Environment`): sums of two numbers."""

    def messages(self, sample: Sum) -> list[ChatMessage]:
        return [ChatMessage(role="user", content=f"What is {sample.a} + {sample.b}?")]

    def target(self, sample: Sum) -> str:
        return str(sample.a + sample.b)

    async def score(self, sample: Sum, text: str) -> Score:
        parse = last_number_parser(text)
        correct, answered = parse.answer == self.target(sample), parse.answer is not None
        return Score(reward=correct + 0.1 * answered, correct=correct, parse=parse, parts={"answered": answered})


def load_samples(args: argparse.Namespace) -> Samples[Sum]:
    sums = [Sum(a, b) for a in range(1, args.largest + 1) for b in range(1, args.largest + 1)]
    random.Random(0).shuffle(sums)
    held_out = len(sums) // 5
    return Samples(train=sums[held_out:], evaluation=sums[:held_out], settings={"largest": args.largest})


TASK = Task(environment=Sums(), load_samples=load_samples)


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("task")
    group.add_argument("--model", required=True, help="hub name or folder")
    group.add_argument("--largest", type=int, default=40, help="largest number that is added (default: 40)")


def build_parser() -> RunParser:
    parser = RunParser(description="Train a model to add two numbers.")
    add_task_arguments(parser)
    add_run_arguments(parser)
    return parser


async def main() -> int:
    await train_from_flags(build_parser().parse_args(), TASK)
    return 0


if __name__ == "__main__":
    run_script("sums.py", main)

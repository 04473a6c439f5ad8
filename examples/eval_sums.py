"""Accuracy on the sums that `sums.py` holds out: records, resume and table as the evaluation of GSM8K has them.

uv run python examples/eval_sums.py --model checkpoints_sums/step_20 --engine local --max-tokens 16
"""

from sums import TASK, add_task_arguments

from ludic.cli import run_script
from ludic.config_file import RunParser
from ludic.flags import add_evaluation_arguments
from ludic.run.checkpoints import evaluate_all_from_flags


def build_parser() -> RunParser:
    parser = RunParser(description="Evaluate a model that adds two numbers.")
    add_task_arguments(parser)
    add_evaluation_arguments(parser, out="sums_eval.jsonl")
    return parser


async def main() -> int:
    await evaluate_all_from_flags(build_parser().parse_args(), TASK)
    return 0


if __name__ == "__main__":
    run_script("eval_sums.py", main)

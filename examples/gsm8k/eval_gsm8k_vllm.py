"""Accuracy of a model or checkpoint on GSM8K: the flags of the task, and its problems. All else is `ludic.run`.

    uv run python -m ludic.inference.vllm_server --model checkpoints_gsm8k/step_100
    uv run python examples/gsm8k/eval_gsm8k_vllm.py --model checkpoints_gsm8k/step_100

`--out` gets one record a problem as it is finished, `<out>.settings.json` what they were made with, a fingerprint of the
weights included, `<out>.prompt.json` the text of the first prompt, and `<out>.summary.json` the figures. A run that was cut
short is finished with `--resume-eval`.
"""

import argparse
import os
from pathlib import Path

from environments.tasks import add_prompt_arguments, evaluate_task
from ludic.cli import run_script, say
from ludic.config import DEFAULT_MODEL
from ludic.config_file import RunParser
from ludic.flags import add_evaluation_arguments

NAME = "eval_gsm8k_vllm.py"


def build_parser() -> RunParser:
    """Every flag, in groups."""
    parser = RunParser(
        prog=NAME,
        description="Accuracy on GSM8K under three rules, with 95% intervals and one record a problem.",
        epilog="Exit code 0: done; 2: something to be put right, in one line; 130: Ctrl-C, what is done is kept.",
    )
    group = parser.add_argument_group("model and problems")
    group.add_argument("--model", default=DEFAULT_MODEL, help=f"folder or hub name (default: {DEFAULT_MODEL})")
    group.add_argument("--split", choices=("train", "test"), default="test", help="which problems (default: test)")
    add_prompt_arguments(group)
    add_evaluation_arguments(parser, out="gsm8k_eval.jsonl")
    parser.set_defaults(task="gsm8k")
    return parser


async def run(args: argparse.Namespace) -> int:
    template = Path(os.path.relpath(Path(__file__).with_name("chatml.jinja")))
    evaluations = await evaluate_task(args, plain_template=template)
    if not (args.checkpoints or args.few_shot) and args.prompt_format == "chat":  # training has no worked examples
        from next_commands import training_advice  # brings an HTTP client

        (evaluation,) = evaluations
        for line in training_advice(args, evaluation.weights, longest=evaluation.longest_prompt):
            say(line)
    return 0


if __name__ == "__main__":
    run_script(NAME, lambda: run(build_parser().parse_args()))

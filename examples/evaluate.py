"""Accuracy of a model or of several checkpoints on any task of `environments/`; `eval_gsm8k_vllm.py` is the same for GSM8K.

uv run python examples/evaluate.py --task math500 --model checkpoints_gsm8k/step_100 --start-server --max-tokens 2048
"""

from environments.tasks import TASKS, add_prompt_arguments, evaluate_task
from ludic.cli import run_script
from ludic.config import DEFAULT_MODEL
from ludic.config_file import RunParser
from ludic.flags import add_evaluation_arguments

DEFAULT_OUT = "TASK_eval.jsonl"


def build_parser() -> RunParser:
    parser = RunParser(description="Accuracy on one of several tasks, with 95% intervals and records.")
    group = parser.add_argument_group("model and problems")
    group.add_argument("--task", choices=tuple(TASKS), required=True, help="which problems")
    group.add_argument("--model", default=DEFAULT_MODEL, help=f"folder or hub name (default: {DEFAULT_MODEL})")
    group.add_argument("--split", choices=("train", "test"), help="default: test; of AIME, which has no other, train")
    add_prompt_arguments(group)
    add_evaluation_arguments(parser, out=DEFAULT_OUT)
    return parser


async def main() -> int:
    args = build_parser().parse_args()
    if args.out == DEFAULT_OUT:
        args.out = args.out.replace("TASK", args.task)
    await evaluate_task(args)
    return 0


if __name__ == "__main__":
    run_script("evaluate.py", main)

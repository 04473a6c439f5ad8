"""Records of an evaluation in the layout of lm-evaluation-harness, for the viewers that read its files.

    uv run python examples/lm_eval_files.py gsm8k_eval.jsonl --out-dir lm_eval

Of records made with `--prompt-format lm-eval`, the lines are those that the harness writes itself of the same completions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from environments.gsm8k import HUB_ID, load
from environments.gsm8k_lm_eval import STOPS, VERSION, extract, until_stop
from ludic.cli import run_script, say
from ludic.rollout.problems import ProblemRecord, read_records
from ludic.run.lm_eval_files import HarnessView, write_lm_eval_files
from ludic.versions import add_version_argument


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write results_*.json and samples_*.jsonl as lm-evaluation-harness does."
    )
    parser.add_argument(
        "records", type=Path, metavar="RECORDS", help="the --out of an evaluation, e.g. gsm8k_eval.jsonl"
    )
    parser.add_argument("--out-dir", type=Path, default=Path("lm_eval"), metavar="DIR",
                        help="gets a folder for the model, as --output_path of the harness does (default: lm_eval)")  # fmt: skip
    add_version_argument(parser)
    return parser


def view_of(records: list[ProblemRecord], settings: dict[str, Any], name: str) -> HarnessView:
    """Of a file's records; those of `--prompt-format lm-eval` are of the harness's own task."""
    few_shot = settings.get("few_shot", 0)
    if settings.get("prompt_format") != "lm-eval":
        return HarnessView(task=name, num_few_shot=few_shot)
    dataset = None if settings["dataset"] == HUB_ID else settings["dataset"]
    rows = load("test", dataset=dataset, limit=1 + max(record["index"] for record in records))
    return HarnessView(
        task="gsm8k",
        num_few_shot=few_shot,
        version=VERSION,
        until=STOPS,
        docs=[{"question": row.question, "answer": row.answer} for row in rows],
        targets=[row.answer for row in rows],
        completion=until_stop,
        answer=extract,
    )


async def main() -> int:
    args = build_parser().parse_args()
    records = read_records(args.records)
    settings = json.loads(Path(f"{args.records}.settings.json").read_text(encoding="utf-8"))
    view = view_of(records, settings, args.records.stem)
    for path in write_lm_eval_files(records, settings, args.out_dir, view):
        say(f"written: {path}")
    return 0


if __name__ == "__main__":
    run_script("lm_eval_files.py", main)

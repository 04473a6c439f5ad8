"""From flags to a task: what the scripts of `examples/` that evaluate have in common. Each task is a module of this folder."""

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from environments import aime, gsm8k, gsm8k_lm_eval, math500, svamp
from environments.few_shot import training_problems
from ludic.cli import say
from ludic.run.checkpoints import evaluate_all_from_flags
from ludic.run.evaluation import Evaluation
from ludic.run.task import Samples, Task


class Entry(NamedTuple):
    """How a task is evaluated."""

    title: str
    hub_id: str
    splits: tuple[str, ...]
    """Those that the hub has, the default first."""
    load: Callable[..., list[Any]]
    environment: Callable[..., Any]
    few_shot: bool
    """Whether there are training problems with worked answers, which the environment takes as `examples`."""


TASKS: Mapping[str, Entry] = {
    "gsm8k": Entry("GSM8K", gsm8k.HUB_ID, ("test", "train"), gsm8k.load, gsm8k.GSM8K, few_shot=True),
    "svamp": Entry("SVAMP", svamp.HUB_ID, ("test", "train"), svamp.load, svamp.SVAMP, few_shot=True),
    "math500": Entry("MATH-500", math500.HUB_ID, ("test",), math500.load, math500.MATH500, few_shot=False),
    "aime": Entry("AIME 2024", aime.HUB_ID, ("train",), aime.load, aime.AIME, few_shot=False),
}


def add_prompt_arguments(group: "argparse._ArgumentGroup") -> None:
    """The flags that say where the problems are, and how they are put."""
    group.add_argument("--dataset", metavar="PATH",
                       help="folder of train and test, or one file: JSONL (.gz), parquet or CSV (default: the hub)")  # fmt: skip
    group.add_argument("--system-prompt", default="",
                       help="the system turn (default: empty, for none, though a chat template may add its own)")  # fmt: skip
    group.add_argument("--few-shot", type=int, metavar="N",
                       help="worked examples: the first N training problems that are not evaluated")  # fmt: skip
    group.add_argument("--prompt-format", choices=("chat", "lm-eval"), default="chat",
                       help="lm-eval: prompt and rules of lm-evaluation-harness's gsm8k, 5 examples (default: chat)")  # fmt: skip


async def evaluate_task(args: argparse.Namespace, *, plain_template: Path | None = None) -> list[Evaluation]:
    """Evaluate `--task` (or what `args.task` is set to) as the flags say.

    Raises:
        ValueError: flags that do not fit the task, and what `evaluate_from_flags` raises; one line.
    """
    entry = TASKS[args.task]
    if args.split not in (None, *entry.splits):
        raise ValueError(f"--split {args.split}: {entry.title} has {' and '.join(entry.splits)}")
    split = args.split or entry.splits[0]
    if args.few_shot is not None and args.few_shot < 0:
        raise ValueError(f"--few-shot must be at least 0, not {args.few_shot}")
    if args.prompt_format == "lm-eval":
        return await evaluate_all_from_flags(args, _lm_eval_task(args, split))
    if args.few_shot and not entry.few_shot:
        raise ValueError(f"--few-shot {args.few_shot}: {entry.title} has no training problems with worked answers")
    async with contextlib.aclosing(entry.environment(system_prompt=args.system_prompt)) as environment:
        return await evaluate_all_from_flags(args, _chat_task(args, entry, split, environment, plain_template))


def _chat_task(
    args: argparse.Namespace, entry: Entry, split: str, environment: Any, plain_template: Path | None
) -> Task[Any]:
    def load_samples(args: argparse.Namespace) -> Samples[Any]:
        settings = {**_source(args, entry, split), "system_prompt": args.system_prompt}
        problems = entry.load(split, dataset=args.dataset, limit=args.limit, say=say)
        if args.few_shot:
            pool = training_problems(entry.load, problems, at_least=args.few_shot, dataset=args.dataset)
            environment.examples = pool[: args.few_shot]
            settings["few_shot"] = args.few_shot
        return Samples(evaluation=problems, settings=settings)

    return Task(
        environment=environment,
        load_samples=load_samples,
        title=f"{entry.title} {split}",
        hub_dataset=None if args.dataset else entry.hub_id,
        plain_template=plain_template,
    )


def _lm_eval_task(args: argparse.Namespace, split: str) -> Task[Any]:
    if args.task != "gsm8k":
        raise ValueError(f"--prompt-format lm-eval is of gsm8k, not of {args.task}")
    for flag, value in (("--system-prompt", args.system_prompt), ("--chat-template", args.chat_template)):
        if value:
            raise ValueError(
                f"{flag} {value}: --prompt-format lm-eval is plain text, without turns and without a template"
            )
    few_shot = gsm8k_lm_eval.NUM_FEW_SHOT if args.few_shot is None else args.few_shot

    def load_samples(args: argparse.Namespace) -> Samples[Any]:
        source = _source(args, TASKS["gsm8k"], split)
        problems = gsm8k_lm_eval.load(split, dataset=args.dataset, limit=args.limit, num_few_shot=few_shot, say=say)
        return Samples(evaluation=problems, settings={**source, "prompt_format": "lm-eval", "few_shot": few_shot})

    return Task(
        environment=gsm8k_lm_eval.GSM8KLMEval(),
        load_samples=load_samples,
        title=f"GSM8K {split} as lm-evaluation-harness, {few_shot}-shot",
        hub_dataset=None if args.dataset else gsm8k.HUB_ID,
        plain_text=True,
        stops=gsm8k_lm_eval.STOPS,
    )


def _source(args: argparse.Namespace, entry: Entry, split: str) -> dict[str, Any]:
    return {"split": split, "dataset": str(Path(args.dataset).resolve()) if args.dataset else entry.hub_id}

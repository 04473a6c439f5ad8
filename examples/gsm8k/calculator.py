r"""GSM8K with a calculator: a turn of the model that holds `<<48/2>>` is answered with `24`, and the model goes on.

    python examples/gsm8k/calculator.py --demo --out-dir out_calculator         no GPU, no server, nothing downloaded
    python examples/gsm8k/calculator.py --model MODEL --micro-token-budget 16384 --max-seq-len 1024

Problems, reward and flags are those of `train_gsm8k.py`. What is new is `next_turn`, and the tool behind it: the model's text is
worked out in another process, under a deadline (`ludic.task.tools`), by a calculator that executes nothing
(`ludic.task.calculator`).

The demo's policy imitates hasty students, as in `demo.py`: they ask the calculator for every step, but most of them box what it
answered first, however many steps the problem has. GRPO finds out from the reward alone that one has to go on asking.
"""

import argparse
import contextlib
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from demo import DEMO_FLAGS, NUM_THREADS, Problem, build_policy, build_tokenizer, draw_problems
from train_gsm8k import build_parser, task_of

from environments.gsm8k import GSM8K, GSM8KSample
from ludic.cli import run_script, say
from ludic.config import GRPOConfig
from ludic.run.training import train_from_flags
from ludic.task import calculator
from ludic.task.tools import Tool
from ludic.types import ChatMessage, Score

SYSTEM_PROMPT = (
    "First, think step by step. To use a calculator, end your message with one expression like <<48/2>>: the next message is "
    r"its value. When you know the final answer, put it inside \boxed{...}."
)
MAX_CALLS = 8
_CALL = re.compile(r"<<([^<>]*)>>")


class GSM8KWithCalculator(GSM8K):
    """The environment (`ludic.task.environment.SeveralTurns`). It has a process of its own: close it with `aclose`."""

    def __init__(self, system_prompt: str = SYSTEM_PROMPT) -> None:
        super().__init__(system_prompt=system_prompt)
        self.tool = Tool(Path(calculator.__file__), "calculate")

    async def next_turn(self, sample: GSM8KSample, turns: Sequence[ChatMessage], /) -> str | None:
        """The value of the last expression in the model's turn; None where there is none, an answer, or too many calls."""
        text = turns[-1]["content"]
        calls = _CALL.findall(text)
        if not calls or "\\boxed" in text or len(turns) >= 2 * MAX_CALLS:
            return None
        reply = await self.tool(calls[-1])
        return f"error: the calculator gave up ({reply.failure})" if reply.failure else reply.text

    async def score(self, sample: GSM8KSample, text: str, turns: Sequence[ChatMessage] = (), /) -> Score:
        """As GSM8K scores the last turn; `calls` says how often the calculator was asked."""
        score = await super().score(sample, text)
        return replace(score, parts={**score.parts, "calls": float(len(turns) // 2)})

    async def aclose(self) -> None:
        await self.tool.aclose()
        await super().aclose()


# --- The demo -------------------------------------------------------------------------------------------------------

FLAGS = DEMO_FLAGS | {"--max-tokens": "64", "--max-seq-len": "128", "--train-steps": "20"}
NUM_TRAIN_PROBLEMS, NUM_TEST_PROBLEMS, NUM_WARM_START_PROBLEMS = 4_000, 256, 10_000
BATCH_SIZE, LEARNING_RATE = 16, 2e-3
"""Of the warm start."""
FINISHED_SHARE = 0.3
"""How many of the students go on after their first step, where there are more."""


def solve(problem: Problem, num_steps: int) -> list[ChatMessage]:
    """The chat of a student who asks the calculator for the first `num_steps` steps and boxes the last value."""
    chat = [ChatMessage(role="user", content=problem.question)]
    for step, result in list(zip(problem.steps, problem.results, strict=True))[:num_steps]:
        chat.append(ChatMessage(role="assistant", content=f"<<{step.partition('=')[0]}>>"))
        chat.append(ChatMessage(role="user", content=str(result)))
    return [*chat, ChatMessage(role="assistant", content=f"\\boxed{{{problem.results[num_steps - 1]}}}")]


def students(problems: Sequence[Problem], seed: int) -> list[tuple[list[ChatMessage], str]]:
    """Each turn of each student as an example for the warm start: the chat before it, and what he writes."""
    rng = random.Random(f"demo calculator {seed}")
    chats = [solve(one, len(one.steps) if rng.random() < FINISHED_SHARE else 1) for one in problems]
    return [
        (chat[:at], turn["content"]) for chat in chats for at, turn in enumerate(chat) if turn["role"] == "assistant"
    ]


def make_demo(args: argparse.Namespace, config: GRPOConfig, out_dir: Path) -> None:
    """Write the demo's problems and a policy that solves them as the students do, and point the flags at them."""
    import json

    import torch

    from ludic import warm_start

    torch.set_num_threads(NUM_THREADS)
    folder = out_dir / "calculator_demo"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw_problems(
        config.seed, num_train=NUM_TRAIN_PROBLEMS, num_test=NUM_TEST_PROBLEMS, num_warm_start=NUM_WARM_START_PROBLEMS
    )
    for name, rows in (("train", drawn.train), ("test", drawn.test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one.row) + "\n" for one in rows), encoding="utf-8")
    tokenizer = build_tokenizer([f"{one.question}\n<<{one.solution()}>>" for one in drawn.train])
    policy = build_policy(tokenizer, config.seed)
    examples = students(drawn.warm_start, config.seed)
    say(f"warm start: a policy of our own imitates {len(examples):,} turns of students who use a calculator ...")
    warm_start(
        policy,
        tokenizer,
        examples,
        max_seq_len=config.max_seq_len,
        steps=len(examples) // BATCH_SIZE,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=config.seed,
    )
    args.model, args.dataset = str(folder / "model"), str(folder)
    policy.save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)


async def main() -> int:
    parser = build_parser()
    parser.prog, parser.description = "calculator.py", "Train a model on GSM8K with a calculator."
    parser.set_flag_defaults({"--system-prompt": SYSTEM_PROMPT})
    if parser.parse_args().demo:
        parser.set_flag_defaults(FLAGS)
    args = parser.parse_args()
    async with contextlib.aclosing(GSM8KWithCalculator(args.system_prompt)) as environment:
        task = replace(
            task_of(args, environment), name="gsm8k_calculator", make_policy=make_demo if args.demo else None
        )
        summary = await train_from_flags(args, task)
    for one in summary.evaluations:
        say(f"after {one['step']} updates: {one['accuracy']:.1%} of {one['num_problems']} problems solved")
    return 0


if __name__ == "__main__":
    run_script("calculator.py", main)

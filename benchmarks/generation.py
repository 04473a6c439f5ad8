"""Rollouts through ludic's client and server against vLLM's own offline `LLM.generate`, on the same requests and one GPU.

    python benchmarks/generation.py --dataset DIR --out OUT

Both sides are processes of their own that share GPU 0 and take turns, batch by batch, so neither ever computes beside the
other. They get the same prompts as token ids, each prompt once (so no side finds it in its prefix cache), 32 prompts with 8
completions each: completions that end where the policy ends them, and completions of exactly 100 tokens. As the lengths of
the first kind are drawn anew, completion tokens a second are what is compared. Then ludic's client alone: how the seconds
grow with the number of completions in flight and with their length.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import (
    HashRewardGSM8K,
    Record,
    check_common_arguments,
    common_parser,
    emit,
    machine,
    markdown_table,
    median,
    numbers,
    open_engine,
    records_of,
    say,
    slope,
    without_stop,
    write_report,
)
from benchmarks.parts import Worker
from benchmarks.processes import (
    VLLM_ENV,
    ensure_policy,
    gpus_for,
    ludic_server,
    process_group,
    required,
    run_and_write,
    serving,
    vllm_settings,
)
from environments.gsm8k import load
from ludic.cli import hide_loading_bars
from ludic.rollout.engine import InferenceEngine
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.types import SamplingParams

GPU_SHARE = 0.4
CASES = ENDED, FIXED = ("ended by the policy", "of fixed length")
GROWTH = {"concurrency": "completions in flight", "length": "completion tokens"}


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="generation")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a batch (default: 32)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=512, help="where the policy ends them (default: 512)")
    parser.add_argument("--fixed-tokens", type=int, default=100, help="of those of fixed length (default: 100)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="batches of each kind, after one that warms up (default: 7)"
    )
    parser.add_argument("--concurrencies", type=numbers, default=[8, 16, 32, 64, 128, 256, 512, 1024], metavar="N,N",
                        help="completions in flight (default: 8 to 1024)")  # fmt: skip
    parser.add_argument("--lengths", type=numbers, default=[128, 256, 512, 1024, 2048, 4096], metavar="N,N",
                        help="tokens of a completion (default: 128 to 4096)")  # fmt: skip
    parser.add_argument("--wave-tokens", type=int, default=128, help="of each completion in flight (default: 128)")
    parser.add_argument("--length-completions", type=int, default=64, help="of each length (default: 64)")
    parser.add_argument("--kv-cache-gib", type=float, default=40.0, help="on each side (default: 40)")
    parser.add_argument("--offline-worker", default="", help=argparse.SUPPRESS)
    return parser


# -- the two sides ---------------------------------------------------------------------------------------------------------


def offline_worker(settings: str) -> None:
    """vLLM without a server: answer each batch on standard input with its seconds and its completion tokens."""
    from vllm import LLM
    from vllm import SamplingParams as VLLMSamplingParams

    llm = LLM(**json.loads(settings), generation_config="vllm", logprobs_mode="processed_logprobs")
    emit({"ready": True})
    for line in sys.stdin:
        batch = json.loads(line)
        sampling = VLLMSamplingParams(
            n=batch["n"],
            temperature=1.0,
            max_tokens=batch["max_tokens"],
            stop_token_ids=batch["stops"],
            logprobs=0 if batch["logprobs"] else None,
            detokenize=False,  # the text is not read here, and ludic's server does not make it either
        )
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        emit({"seconds": seconds, "completion_tokens": tokens})


async def generate(
    engine: InferenceEngine, prompts: Sequence[list[int]], *, n: int, max_tokens: int, logprobs: bool
) -> Record:
    """One batch through an engine of ludic: its seconds and its completion tokens."""
    sampling = SamplingParams(temperature=1.0, max_tokens=max_tokens, logprobs=logprobs, seed=0)
    started = time.perf_counter()
    groups = await asyncio.gather(
        *(engine.generate(prompt, num_completions=n, sampling=sampling) for prompt in prompts)
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "completion_tokens": sum(len(c.token_ids) for group in groups for c in group)}


# -- the parts -------------------------------------------------------------------------------------------------------------


class PromptSource:
    """GSM8K's prompts as token ids, in order; each is handed out once until all were."""

    def __init__(self, policy: Path, dataset: Path) -> None:
        self.policy = policy
        tokenizer, environment = load_tokenizer(policy), HashRewardGSM8K()
        samples = load("train", dataset=dataset, limit=4096)
        self.all = [encode_prompt(tokenizer, environment.messages(sample)) for sample in samples]
        self._next = itertools.cycle(self.all)

    def take(self, count: int) -> list[list[int]]:
        return list(itertools.islice(self._next, count))


async def compare(
    args: argparse.Namespace,
    engines: Mapping[str, InferenceEngine],
    offline: Worker | None,
    stops: list[int],
    source: PromptSource,
) -> list[Record]:
    """Every kind of batch on both sides, in turns; the first round warms up and is left out."""
    rows: list[Record] = []
    for repeat in range(args.repeats + 1):
        for case, logprobs in itertools.product(CASES, (False, True)):
            prompts = source.take(args.prompts)
            max_tokens = args.max_tokens if case == ENDED else args.fixed_tokens
            sides = {
                "ludic": await generate(
                    engines[case], prompts, n=args.group_size, max_tokens=max_tokens, logprobs=logprobs
                )
            }
            if offline is not None:
                batch = {"prompts": prompts, "n": args.group_size, "max_tokens": max_tokens, "logprobs": logprobs}
                sides["offline"] = offline.ask({**batch, "stops": stops if case == ENDED else []})
            if repeat:
                rows += [{"case": case, "logprobs": logprobs, "side": side, **row} for side, row in sides.items()]
    return rows


async def grow(
    args: argparse.Namespace, url: str | None, policy: Path, source: PromptSource
) -> Mapping[str, list[Record]]:
    """ludic's client alone: one wave of each concurrency, and 64 completions of each length; the quicker of two runs."""

    async def measure(completions: int, max_tokens: int) -> Record:
        n = min(args.group_size, completions)
        async with open_engine(policy, url, concurrency=completions) as engine:
            runs = [
                await generate(engine, source.take(completions // n), n=n, max_tokens=max_tokens, logprobs=False)
                for _ in range(2)
            ]
        return min(runs, key=lambda run: float(run["seconds"]))

    return {
        "concurrency": [{"x": c, **await measure(c, args.wave_tokens)} for c in args.concurrencies],
        "length": [{"x": length, **await measure(args.length_completions, length)} for length in args.lengths],
    }


async def measure_all(args: argparse.Namespace) -> None:
    """Make the policy, start both sides, and record what each part gives as soon as it is done."""
    check_common_arguments(args)
    records = records_of(args)
    records.add("machine", **machine())
    hide_loading_bars()
    serving_gpu, training_gpu = gpus_for(args.device)
    trained = ensure_policy(args, gpu=training_gpu)
    policy, stops = without_stop(trained, args.out / "policy_without_stop")
    source = PromptSource(policy, args.dataset)
    longest = max([args.max_tokens, args.fixed_tokens, args.wave_tokens, *args.lengths])
    settings = vllm_settings(
        device=args.device,
        max_model_len=longest + max(len(prompt) for prompt in source.all),
        gpu_share=GPU_SHARE,
        kv_cache_gib=args.kv_cache_gib,
    )
    with contextlib.ExitStack() as stack:
        url: str | None = None
        offline: Worker | None = None
        if args.engine == "vllm":
            command = [
                sys.executable,
                "-m",
                "benchmarks.generation",
                "--offline-worker",
                json.dumps({"model": str(policy), **settings}),
            ]
            log_path = args.out / "offline.log"
            process = stack.enter_context(
                process_group(command, log_path=log_path, gpu=serving_gpu, env=VLLM_ENV, pipes=True)
            )
            offline = Worker(process, log_path)
            servers = stack.enter_context(serving([ludic_server(policy, settings, gpu=serving_gpu)], log_dir=args.out))
            url = required(servers, "ludic")
            offline.ready(300.0)
            say("offline vLLM is up")
        async with open_engine(policy, url, stops=stops) as ended, open_engine(policy, url) as fixed:
            rows = await compare(args, {ENDED: ended, FIXED: fixed}, offline, stops, source)
        records.add("compare", rows=rows)
        say("compared")
        records.add("growth", **await grow(args, url, policy, source))


# -- the table -------------------------------------------------------------------------------------------------------------


def write_table(args: argparse.Namespace) -> None:
    """OUT/generation.md from the records."""
    records = records_of(args).last()
    sections = []
    if "compare" in records:
        sections += [compare_table(records["compare"]["rows"]), cost_table(records["compare"]["rows"])]
    if "growth" in records:
        sections += [growth_table(records["growth"][kind], title) for kind, title in GROWTH.items()]
    write_report(args.out / "generation.md", "Generation", records["machine"], sections)


def _of(rows: Sequence[Record], case: str, logprobs: bool, side: str) -> tuple[float, float, float]:
    """Medians over the batches of one kind: seconds, completion tokens, tokens a second (NaN where there are none)."""
    chosen = [row for row in rows if (row["case"], row["logprobs"], row["side"]) == (case, logprobs, side)]
    seconds, tokens = [row["seconds"] for row in chosen], [row["completion_tokens"] for row in chosen]
    return median(seconds), median(tokens), median([t / s for t, s in zip(tokens, seconds, strict=True)])


def compare_table(rows: Sequence[Record]) -> str:
    lines = []
    for case, logprobs in itertools.product(CASES, (False, True)):
        offline, ludic = (_of(rows, case, logprobs, side) for side in ("offline", "ludic"))
        words = f"{case}, {'with' if logprobs else 'no'} log-probs"
        lines.append([words, offline[0], ludic[0], offline[1], ludic[1], offline[2], ludic[2], ludic[2] / offline[2]])
    headers = ["completions", "offline s", "ludic s", "offline tokens", "ludic tokens", "offline tok/s", "ludic tok/s"]
    return markdown_table([*headers, "ludic / offline"], lines)


def cost_table(rows: Sequence[Record]) -> str:
    """What log-probs cost: tokens a second without them over tokens a second with them, minus 1."""
    lines = []
    for case in CASES:
        costs = [_of(rows, case, False, side)[2] / _of(rows, case, True, side)[2] - 1 for side in ("offline", "ludic")]
        lines.append([case, *(f"{cost:.1%}" if math.isfinite(cost) else None for cost in costs)])
    return markdown_table(["cost of log-probs", "offline", "ludic"], lines)


def growth_table(points: Sequence[Record], what: str) -> str:
    xs, seconds = [point["x"] for point in points], [point["seconds"] for point in points]
    rates = [point["completion_tokens"] / point["seconds"] for point in points]
    grows = [
        *([x, s, rate] for x, s, rate in zip(xs, seconds, rates, strict=True)),
        ["slope", slope(xs, seconds), None],
    ]
    return markdown_table([what, "seconds", "tokens/s"], grows)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.offline_worker:
        offline_worker(args.offline_worker)
        return 0
    return run_and_write(args, lambda: asyncio.run(measure_all(args)), write_table)


if __name__ == "__main__":
    sys.exit(main())

"""Bare generation with 1, 2 and 4 engines on one GPU (`--server-engines`), by turns.

    python benchmarks/engines.py --dataset DIR --out OUT

The engines are started once, by one command, and the first 1, 2 and 4 of them are used by turns for the same prompts: 32
prompts with 8 completions each, with log-probs, which the policy ends or 512 tokens do. No count of engines finds a prompt in
a prefix cache that another one has filled. As lengths are drawn, completion tokens a second are compared. Every engine holds
its share of the memory all the time, also while others are idle.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Sequence

from benchmarks.generation import PromptSource, generate
from benchmarks.harness import (
    Record,
    check_common_arguments,
    common_parser,
    machine,
    markdown_table,
    median,
    numbers,
    open_engine,
    records_of,
    say,
    write_report,
)
from benchmarks.processes import ensure_policy, gpus_for, ludic_server, required, run_and_write, serving, vllm_settings
from ludic.cli import hide_loading_bars

GPU_SHARE = 0.88
START_S = 900.0
"""For all engines: on a GPU the others start once the first has compiled."""


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="engines")
    parser.add_argument("--engines", type=numbers, default=[1, 2, 4], metavar="N,N", help="counts (default: 1,2,4)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a batch (default: 32)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a completion (default: 512)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="batches of each count, after one that warms up (default: 7)"
    )
    parser.add_argument("--kv-cache-gib", type=float, default=16.0, help="of each engine (default: 16)")
    return parser


async def take_turns(args: argparse.Namespace, url: str, source: PromptSource, stops: list[int]) -> list[Record]:
    """The same batch with each count of engines, in an order that turns; the first round warms up and is left out."""
    rows: list[Record] = []
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            count: await stack.enter_async_context(open_engine(source.policy, url, stops=stops, num_engines=count))
            for count in args.engines
        }
        for repeat in range(args.repeats + 1):
            prompts, turn = source.take(args.prompts), repeat % len(args.engines)
            for count in [*args.engines[turn:], *args.engines[:turn]]:
                row = await generate(
                    engines[count], prompts, n=args.group_size, max_tokens=args.max_tokens, logprobs=True
                )
                if repeat:
                    rows.append({"engines": count, **row})
    return rows


async def measure_all(args: argparse.Namespace) -> None:
    """Make the policy, start as many engines as the largest count, and record every batch."""
    check_common_arguments(args)
    if args.engine == "local" or not args.engines or min(args.engines) < 1:
        raise ValueError(f"--engines {args.engines}, --engine {args.engine}: give counts from 1 on, of a vLLM server")
    records = records_of(args)
    records.add("machine", **machine())
    hide_loading_bars()
    from ludic.inference.client.vllm_client import stop_token_ids
    from ludic.task.prompts import load_tokenizer

    serving_gpu, training_gpu = gpus_for(args.device)
    policy = ensure_policy(args, gpu=training_gpu)
    source = PromptSource(policy, args.dataset)
    settings = vllm_settings(
        device=args.device,
        max_model_len=args.max_tokens + max(len(prompt) for prompt in source.all),
        gpu_share=GPU_SHARE,
        kv_cache_gib=args.kv_cache_gib,
    )
    spec = ludic_server(policy, {**settings, "server_engines": max(args.engines)}, gpu=serving_gpu, name="engines")
    with serving([spec], log_dir=args.out, deadline_s=START_S) as servers:
        url = required(servers, "engines")
        say(f"{max(args.engines)} engines are up")
        rows = await take_turns(args, url, source, stop_token_ids(str(policy), load_tokenizer(policy)))
    records.add("turns", rows=rows)


def write_table(args: argparse.Namespace) -> None:
    """OUT/engines.md from the records."""
    records = records_of(args).last()
    sections = [engines_table(records["turns"]["rows"])] if "turns" in records else []
    write_report(args.out / "engines.md", "Engines on one GPU", records["machine"], sections)


def engines_table(rows: Sequence[Record]) -> str:
    """Medians over the batches of each count, and the median of its tokens a second over that of the smallest count."""
    figures: dict[int, list[float]] = {}
    for count in sorted({row["engines"] for row in rows}):
        chosen = [row for row in rows if row["engines"] == count]
        seconds, tokens = [row["seconds"] for row in chosen], [row["completion_tokens"] for row in chosen]
        figures[count] = [
            median(seconds),
            median(tokens),
            median([t / s for t, s in zip(tokens, seconds, strict=True)]),
        ]
    first, (*_, rate) = next(iter(figures.items()))
    lines = [[str(count), *row, row[2] / rate] for count, row in figures.items()]
    return markdown_table(["engines", "seconds", "tokens", "tokens/s", f"over {first}"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_and_write(args, lambda: asyncio.run(measure_all(args)), write_table)


if __name__ == "__main__":
    sys.exit(main())

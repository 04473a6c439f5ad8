"""The LM head's product in bf16 and in fp32 (`--fp32-head`): log-prob gap, seconds and peak memory, in one run.

    PYTHONPATH=src:. python benchmarks/head.py --out OUT                  one GPU, a minute
    PYTHONPATH=src:. python benchmarks/head.py --out OUT --device cpu --tokens 256 --shapes 64x997      to test it

Each shape is a head alone: bf16 hidden states and weights whose logits have the standard deviation --logit-std, and targets
drawn from their distribution, as sampled tokens are. The reference has the same bf16 numbers in fp32 operands, so the gap is
that of the product's rounding and nothing else. What it does to a whole update is in `trainer.py` (part `head`), and to a
real model against its server in `logprob_gap.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Record, machine, markdown_table, records_of, say, write_report
from benchmarks.processes import run_and_write

if TYPE_CHECKING:
    import torch

    from ludic.train.lm_head import Head

SHAPES = "576x49152,896x151936,2048x128256"
"""Hidden size x vocabulary: SmolLM2-135M, Qwen2.5-0.5B, Llama 3.2 1B."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of records and table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default=SHAPES, help="HIDDENxVOCABULARY, comma-separated (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="positions of one micro-batch (default: 16384)")
    parser.add_argument("--chunk", type=int, default=4096, help="as --logprob-chunk (default: 4096)")
    parser.add_argument("--logit-std", type=float, default=5.0, help="of the logits (default: 5, so up to 20 and more)")
    parser.add_argument("--repeats", type=int, default=7, help="timed forward and backward passes (default: 7)")
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    parser.set_defaults(name="head")
    return parser


def operands(args: argparse.Namespace, hidden_size: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """Hidden states [N, H] and weight [V, H] in bf16, and targets [N] drawn from what they say."""
    import torch

    torch.manual_seed(0)
    with torch.device(args.device):
        hidden = torch.randn(args.tokens, hidden_size).bfloat16()
        weight = (torch.randn(vocabulary, hidden_size) * args.logit_std / hidden_size**0.5).bfloat16()
        targets = [
            (part.float() @ weight.float().t()).softmax(-1).multinomial(1).squeeze(-1) for part in hidden.split(1024)
        ]
    return hidden, weight, torch.cat(targets)


def measure(args: argparse.Namespace, hidden_size: int, vocabulary: int) -> list[Record]:
    """A row for each product: its gap to fp32 operands, and what forward and backward cost."""
    import torch

    from ludic.train.lm_head import Head, head_stats

    hidden, weight, targets = operands(args, hidden_size, vocabulary)
    on_gpu = args.device == "cuda"

    def run(head: Head, states: torch.Tensor) -> torch.Tensor:
        logprobs, _ = head_stats(
            head,
            states,
            targets,
            temperature=1.0,
            chunk_size=args.chunk,
            with_entropy=True,
            compiled=on_gpu,
        )
        return logprobs

    with torch.no_grad():
        wide = weight.float()
        exact = run(Head(wide, None, 1.0, None), hidden.float())
        del wide
    rows = []
    for name, fp32_product in (("bf16", False), ("fp32", True)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def update(leaves: tuple[torch.Tensor, torch.Tensor] = leaves, fp32: bool = fp32_product) -> torch.Tensor:
            logprobs = run(Head(leaves[1], None, 1.0, None, fp32_product=fp32), leaves[0])
            torch.autograd.grad(logprobs.sum(), leaves)
            return logprobs.detach()

        gap = (update() - exact).abs()
        seconds, peak = _cost(update, repeats=args.repeats, on_gpu=on_gpu)
        rows.append(
            {"shape": f"{hidden_size}x{vocabulary}", "product": name, "gap_mean": gap.mean().item(),
             "gap_max": gap.max().item(), "seconds": seconds, "peak_gib": peak}
        )  # fmt: skip
    return rows


def _cost(update: Callable[[], object], *, repeats: int, on_gpu: bool) -> tuple[float, float | None]:
    """Median seconds of a forward and backward pass, and GiB at the peak beyond what lay there before."""
    import torch

    seconds = []
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(repeats):
        started = time.perf_counter()
        update()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None
    return statistics.median(seconds), peak


def run_shapes(args: argparse.Namespace) -> None:
    records = records_of(args)
    records.add("machine", **machine())
    rows = []
    for shape in args.shapes.split(","):
        hidden_size, _, vocabulary = shape.partition("x")
        if not (hidden_size.isdigit() and vocabulary.isdigit()):
            raise ValueError(f"--shapes {shape} is not HIDDENxVOCABULARY, as in 896x151936")
        rows += measure(args, int(hidden_size), int(vocabulary))
        for row in rows[-2:]:
            say(f"{row['shape']} {row['product']}: {row['gap_mean']:.2g} nats, {row['seconds']:.4f} s")
    records.add("head", rows=rows)


def write_table(args: argparse.Namespace) -> None:
    found = records_of(args).last()
    if "head" not in found:
        return
    headers = ["hidden x vocabulary, product", "mean gap, nats", "largest", "forward and backward s", "peak GiB"]
    cells = [
        [f"{row['shape']}, {row['product']}", row["gap_mean"], row["gap_max"], row["seconds"], row["peak_gib"]]
        for row in found["head"]["rows"]
    ]
    write_report(args.out / "head.md", "The LM head's product", found["machine"], [markdown_table(headers, cells)])


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return run_and_write(args, lambda: run_shapes(args), write_table)


if __name__ == "__main__":
    sys.exit(main())

"""The trainer alone: tokens a second, MFU, memory and idle time of packed rows, and what each choice in them is worth.

    PYTHONPATH=src:. python benchmarks/trainer.py --out OUT                one GPU; the parts of --parts, one after the other

Every part is a process of its own with random weights and random tokens: neither changes the time. It trains through
`ludic.train.learner`, as a run does, on whole updates: packing, copies to the device, forward, backward, clipping, step.

MFU is 6 x parameters x tokens forwarded / seconds / 989 TFLOP/s (the dense bf16 peak of an H100 or H200 SXM); tokens a
second count the tokens of the sequences, a shared prompt once for each of its completions. "Idle" is the share of an
update's wall clock in which no kernel ran; "between" is what of it lay between one micro-batch and the next.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness import (
    Record,
    common_parser,
    emit,
    machine,
    markdown_table,
    records_of,
    say,
    slope,
    write_report,
)
from benchmarks.make_policy import SHAPES
from benchmarks.parts import run_part
from benchmarks.processes import PartError, run_and_write
from ludic.config import GRPOConfig
from ludic.types import TrainingSample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ludic.train.learner import Learner

PEAK_FLOPS = 989e12
PARTS = ("mfu", "mfu-1.5b", "mfu-7b", "sharing", "budget", "vocabulary", "head", "gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Sequences of one update, in groups of `group_size` that share a prompt."""

    prompt: tuple[int, int]
    """Mean and standard deviation, in tokens."""
    completion: tuple[int, int]
    num_sequences: int
    group_size: int = 8


GSM8K_LIKE = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=256)
"""As the from-scratch policy of `make_policy.py` writes them."""
EVEN = Lengths(prompt=(100, 0), completion=(100, 0), num_sequences=512)


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="trainer")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=5, help="timed updates of each row (default: 5)")
    parser.add_argument("--sequences", type=int, default=256, help="of one update (default: 256)")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds that a part may take (default: 240)")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    return parser


# -- one measurement -------------------------------------------------------------------------------------------------------


def update_samples(lengths: Lengths, vocab_size: int, seed: int = 0) -> list[TrainingSample]:
    """One update's samples with random tokens."""
    draw = random.Random(seed)

    def length(mean: int, deviation: int) -> int:
        return max(8, round(draw.gauss(mean, deviation)))

    samples = []
    for index in range(lengths.num_sequences):
        if index % lengths.group_size == 0:
            prompt = [draw.randrange(vocab_size) for _ in range(length(*lengths.prompt))]
        completion = [draw.randrange(vocab_size) for _ in range(length(*lengths.completion))]
        samples.append(
            TrainingSample(
                token_ids=prompt + completion,
                loss_mask=[False] * len(prompt) + [True] * len(completion),
                rollout_logprobs=None,
                advantage=draw.choice((-1.0, 1.0)),
            )
        )
    return samples


def build_model(shape: str, device: str, **changes: Any) -> PreTrainedModel:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    settings = {"tie_word_embeddings": True, **SHAPES[shape], **changes}
    config = Qwen2Config(
        **settings, max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    return model


def build_learner(args: argparse.Namespace, shape: str, *, vocab_size: int | None = None, **settings: Any) -> Learner:
    import torch

    from ludic.train.learner import Learner

    torch._dynamo.reset()
    config = GRPOConfig(**{"micro_token_budget": 16384, "max_seq_len": 1024, "learning_rate": 1e-6, **settings})
    changes = {} if vocab_size is None else {"vocab_size": vocab_size}
    return Learner(config, build_model(shape, args.device, **changes))


def measure(args: argparse.Namespace, learner: Learner, lengths: Lengths, *, updates: int | None = None) -> Record:
    """Seconds, throughput, MFU, memory and idle time of whole updates; the first two are warm-up."""
    import torch

    samples = update_samples(lengths, learner.model.config.vocab_size)
    on_gpu = args.device == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def update() -> dict[str, float]:
        learner.accumulate(samples)
        return learner.step(learning_rate=1e-6)

    first = time.perf_counter()
    update()
    wait()
    first_s = time.perf_counter() - first
    update()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.updates if updates is None else updates):
        wait()
        started = time.perf_counter()
        figures = update()
        wait()
        seconds.append(time.perf_counter() - started)
    typical = statistics.median(seconds)
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    record: Record = {
        "first_s": first_s,
        "update_s": typical,
        "tokens_per_s": figures["trained_tokens"] / typical,
        "forwarded_per_s": figures["forwarded_tokens"] / typical,
        "forwarded_share": figures["forwarded_tokens"] / figures["trained_tokens"],
        "micro_batches": figures["micro_batches"],
        "mfu": 6 * parameters * figures["forwarded_tokens"] / typical / PEAK_FLOPS,
    }
    if on_gpu:
        record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        record |= idle(learner, update, typical)
    return record


def idle(learner: Learner, update: Any, typical_s: float) -> Record:
    """The share of an update in which the GPU waited: in all (against the kernels' time), and between micro-batches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    backward = learner._backward

    def marked(*positional: Any, **named: Any) -> Any:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        result = backward(*positional, **named)
        end.record()
        marks.append((begin, end))
        return result

    learner._backward = marked  # type: ignore[method-assign]
    update()
    torch.cuda.synchronize()
    learner._backward = backward  # type: ignore[method-assign]
    gaps = sum(one[1].elapsed_time(next_[0]) for one, next_ in itertools.pairwise(marks))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        update()
        torch.cuda.synchronize()
    kernels_s = sum(event.self_device_time_total for event in recorded.key_averages()) / 1e6
    return {"idle": max(0.0, 1 - kernels_s / typical_s), "idle_between": gaps / 1e3 / typical_s, "kernels_s": kernels_s}


# -- the parts, each in a process of its own -------------------------------------------------------------------------------


def part_mfu(args: argparse.Namespace, shape: str = "0.5b", **settings: Any) -> None:
    from benchmarks.peers import padded_trainer

    lengths = Lengths(prompt=GSM8K_LIKE.prompt, completion=GSM8K_LIKE.completion, num_sequences=args.sequences)
    sizes = [len(sample.token_ids) for sample in update_samples(lengths, SHAPES[shape]["vocab_size"])]
    if shape not in ("1.5b", "7b"):
        padded = padded_trainer.run(shape, sizes, device=args.device, passes=args.updates)
        emit({"row": f"{shape}, padded rows, sdpa", **padded})
        _free()
    rows: list[tuple[str, dict[str, Any]]] = [
        ("packed", {"compile": False, "share_prompts": False}),
        ("packed, compiled", {"share_prompts": False}),
        ("packed, compiled, prompts shared", {}),
    ]
    for name, changes in {"7b": rows[-1:], "1.5b": rows[1:]}.get(shape, rows):
        learner = build_learner(args, shape, **changes, **settings)
        emit({"row": f"{shape}, {name}", **measure(args, learner, lengths)})
        del learner
        _free()


def part_sharing(args: argparse.Namespace) -> None:
    lengths = Lengths(prompt=EVEN.prompt, completion=EVEN.completion, num_sequences=2 * args.sequences)
    for shared in (False, True):
        learner = build_learner(args, "0.5b" if args.device == "cuda" else "tiny", share_prompts=shared)
        emit({"row": "shared" if shared else "each sequence with its own prompt", **measure(args, learner, lengths)})
        del learner
        _free()


def part_budget(args: argparse.Namespace) -> None:
    cuda = args.device == "cuda"
    learner = build_learner(args, "0.5b" if cuda else "tiny", share_prompts=False)
    for budget in (4096, 8192, 16384, 32768, 65536) if cuda else (1024, 2048):
        learner.token_budget = budget
        # Enough sequences for two micro-batches of the largest budget.
        lengths = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=640 if cuda else 32)
        emit({"row": f"{budget:,}", "budget": budget, **measure(args, learner, lengths, updates=3)})


def part_vocabulary(args: argparse.Namespace) -> None:
    for size in (32_000, 64_000, 151_936) if args.device == "cuda" else (512, 4096):
        learner = build_learner(args, "0.5b" if args.device == "cuda" else "tiny", vocab_size=size, compile=False)
        lengths = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=args.sequences)
        emit({"row": f"{size:,}", "vocabulary": size, **measure(args, learner, lengths, updates=3)})
        del learner
        _free()


def part_head(args: argparse.Namespace) -> None:
    """Whole updates with logits in fp32 and rounded to bf16 (`head.py` has the head alone)."""
    lengths = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=args.sequences)
    for name, fp32_head in (("logits in fp32", True), ("logits in bf16", False)):
        learner = build_learner(args, "0.5b" if args.device == "cuda" else "tiny", fp32_head=fp32_head)
        emit({"row": name, **measure(args, learner, lengths)})
        del learner
        _free()


def part_gradients(args: argparse.Namespace) -> None:
    """The gradient of one update as trained against the plain one: separate rows, fp32, full logits, on the same device."""
    from ludic.train.learner import Learner

    cuda = args.device == "cuda"
    lengths = Lengths(prompt=(98, 25), completion=(100, 45), num_sequences=64 if cuda else 16)
    reference = plain_gradients(args, lengths)
    for name, settings in (
        ("packed", {"compile": False, "share_prompts": False}),
        ("packed, prompts shared", {"compile": False}),
        ("packed, prompts shared, compiled", {}),
    ):
        config = GRPOConfig(micro_token_budget=16384 if cuda else 2048, max_seq_len=1024, loss="dapo", **settings)  # type: ignore[arg-type]
        learner = Learner(config, build_model("0.5b" if cuda else "tiny", args.device))
        learner.accumulate(update_samples(lengths, learner.model.config.vocab_size))
        difference = norm = 0.0
        for master, expected in zip(learner.masters.parameters, reference, strict=True):
            assert master.grad is not None
            gradient = master.grad / learner._part.num_loss_tokens
            difference += float((gradient.cpu() - expected).double().square().sum())
            norm += float(expected.double().square().sum())
        emit({"row": name, "relative_error": (difference / norm) ** 0.5, "dtype": "bf16" if cuda else "fp32"})
        del learner
        _free()


def plain_gradients(args: argparse.Namespace, lengths: Lengths) -> list[torch.Tensor]:
    """One sequence at a time through the untouched model in fp32, on the CPU's memory afterwards."""
    import torch

    model = build_model("0.5b" if args.device == "cuda" else "tiny", args.device)
    samples = update_samples(lengths, model.config.vocab_size)
    total = sum(sum(sample.loss_mask) for sample in samples)
    for sample in samples:
        tokens = torch.tensor([sample.token_ids], device=args.device)
        logprobs = model(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[0, 1:, None]).squeeze(-1)
        mask = torch.tensor(sample.loss_mask[1:], device=args.device)
        (-(chosen * mask).sum() * sample.advantage / total).backward()
    gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
    del model
    _free()
    return gradients


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_one(args: argparse.Namespace) -> None:
    tiny = args.device == "cpu"
    if args.part.startswith("mfu"):
        shape = "tiny" if tiny else args.part.partition("-")[2] or "0.5b"
        part_mfu(args, shape, **({"gradient_checkpointing": True} if shape == "7b" else {}))
    else:
        {
            "sharing": part_sharing,
            "budget": part_budget,
            "vocabulary": part_vocabulary,
            "head": part_head,
            "gradients": part_gradients,
        }[args.part](args)


# -- the table -------------------------------------------------------------------------------------------------------------


def write_table(args: argparse.Namespace) -> None:
    records = records_of(args).last()
    found = {name: record for name, record in records.items() if record.get("rows")}
    sections = []
    speed = [row for part in ("mfu", "mfu-1.5b", "mfu-7b") for row in found.get(part, {}).get("rows", [])]
    if speed:
        sections.append(_speed_table("Trainer", speed))
    if "sharing" in found:
        rows = found["sharing"]["rows"]
        sections.append(_speed_table("Prompts of 100 tokens shared by 8 completions of 100", rows))
        if len(rows) == 2:
            sections.append(
                f"Shared against not: {rows[1]['tokens_per_s'] / rows[0]['tokens_per_s']:.2f} x real tokens a second."
            )
    if "head" in found:
        sections.append(_speed_table("LM head (0.5B shape)", found["head"]["rows"]))
    for part, key in (("budget", "budget"), ("vocabulary", "vocabulary")):
        if part in found:
            rows = found[part]["rows"]
            sections.append(_speed_table(f"{part.capitalize()} (0.5B shape)", rows))
            peaks = [row.get("peak_gib") for row in rows]
            if all(peaks):
                growth = slope([row[key] for row in rows], peaks)
                sections.append(f"Peak memory grows with the {part} to the power of {growth:.2f}.")
    if "gradients" in found:
        rows = found["gradients"]["rows"]
        table = markdown_table(
            ["gradient", "relative error"], [[row["row"], f"{row['relative_error']:.2e}"] for row in rows]
        )
        sections.append(f"Against separate rows, fp32, full logits (computed in {rows[0]['dtype']}):\n\n{table}")
    sections += [f"{part}: {record['problem']}." for part, record in records.items() if record.get("problem")]
    write_report(args.out / "trainer.md", "The trainer alone", records["machine"], sections)


def _speed_table(title: str, rows: Sequence[Record]) -> str:
    headers = [title, "update s", "tokens/s", "MFU %", "peak GiB", "forwarded", "idle %", "between %", "first s"]
    cells = []
    for row in rows:
        shares = [None if row.get(name) is None else 100 * row[name] for name in ("mfu", "idle", "idle_between")]
        seconds = row.get("update_s", row.get("seconds"))
        cells.append(
            [row["row"], seconds, row["tokens_per_s"], shares[0], row.get("peak_gib"), row.get("forwarded_share"),
             shares[1], shares[2], row.get("first_s")]
        )  # fmt: skip
    return markdown_table(headers, cells)


def run_parts(args: argparse.Namespace) -> None:
    records = records_of(args)
    records.add("machine", **machine())
    for part in args.parts.split(","):
        if part not in PARTS:
            raise ValueError(f"--parts {part} is not one of {', '.join(PARTS)}")
        say(f"part {part}")
        command = [sys.executable, __file__, "--part", part, "--device", args.device, "--updates", str(args.updates),
                   "--sequences", str(args.sequences)]  # fmt: skip
        try:
            rows = run_part(command, log_path=args.out / f"trainer_{part}.log", deadline_s=args.deadline)
        except PartError as error:
            say(f"part {part} failed: {error}")
            records.add(part, rows=[], problem=str(error))
            continue
        for row in rows:
            say(
                ", ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()
                )
            )
        records.add(part, rows=[row for row in rows if "row" in row], problem=rows[-1].get("cut_off"))


def main() -> None:
    args = build_parser().parse_args()
    if args.part:
        run_one(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    sys.exit(run_and_write(args, lambda: run_parts(args), write_table))


if __name__ == "__main__":
    main()

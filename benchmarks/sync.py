"""Seconds of a weight sync, from pause to resume, by its phases; and of vLLM's own NCCL transfer in the same run.

    python benchmarks/sync.py --dataset DIR --out OUT            two GPUs; the 0.5B and the 1.5B shape with random weights
    python benchmarks/sync.py --dataset DIR --out OUT --lora-rank 16            an adapter of rank 16 against whole models

For each shape one server of ludic, without compilation, and one with vLLM's own `nccl` backend come up on GPU 0; the
trainer's half is a process on GPU 1. ludic's syncs are proven and are measured twice: with an idle server, and with generation in
flight. vLLM's own are what a plain client of its routes does: wait for running requests, pause, send, resume, no proof. The
first syncs are left out: they set up NCCL, and ludic's first goes through vLLM's reload. `open` and `probe`, which do not
hold generation, are not counted. A LoRA run that sends whole models merges its adapter before a sync, which is not in the
figures either.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import (
    Record,
    add_server_argument,
    check_common_arguments,
    common_parser,
    emit,
    machine,
    markdown_table,
    median,
    open_engine,
    percentile,
    records_of,
    say,
    write_report,
)
from benchmarks.parts import run_part
from benchmarks.processes import (
    PartError,
    ensure_policy,
    gpus_for,
    ludic_server,
    run_and_write,
    serving,
    vllm_settings,
)
from ludic.cli import hide_loading_bars
from ludic.rollout.engine import InferenceEngine, PolicyWeights
from ludic.types import SamplingParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

UNCOUNTED = ("open", "probe", "wait")
PROBE = list(range(5, 60))
GPU_SHARE, KV_CACHE_GIB = 0.2, 6.0
WHO = {"ludic": "ludic, proven", "adapter": "ludic, an adapter alone, proven", "nccl": "vLLM's own, not proven"}


def build_parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__, name="sync")
    add_server_argument(parser)
    parser.add_argument("--shapes", default="0.5b,1.5b", help="comma-separated (default: %(default)s)")
    parser.add_argument("--syncs", type=int, default=30, help="of each kind (default: 30)")
    parser.add_argument("--skip", type=int, default=3, help="first syncs that are left out (default: 3)")
    parser.add_argument(
        "--in-flight", type=int, default=256, help="completions in flight in the second half (default: 256)"
    )
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds that a part may take (default: 180)")
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="in place of vLLM's own transfer, send an adapter of this rank to a server with --enable-lora; 0: none (default: 0)",
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--url", default=None, help=argparse.SUPPRESS)
    return parser


# -- the trainer's half, a process of its own ------------------------------------------------------------------------------


def load_masters(policy: Path) -> PreTrainedModel:
    """The model as a trainer holds it: float32 on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    from ludic.train.attention import prepare_packed_attention

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    model = torch.nn.Module.to(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prepare_packed_attention(model)
    return model


def with_adapter(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """The model as a LoRA run trains it: on a GPU the base in bf16, and an adapter in all linear layers."""
    import torch

    from ludic.config import GRPOConfig
    from ludic.train.lora import Adapter

    on_gpu = next(model.parameters()).is_cuda
    config = GRPOConfig(lora_rank=rank, lora_sync="adapter")
    Adapter(model, config, compute_dtype=torch.bfloat16 if on_gpu else torch.float32)
    return model


def change_a_little(model: torch.nn.Module) -> None:
    """So that a sync which transfers nothing would be found out."""
    import torch

    with torch.no_grad():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained[-1].mul_(1.01).add_(1e-4)  # B of an adapter begins at 0


async def proven_syncs(
    policy: Path, url: str | None, *, syncs: int, in_flight: int, rank: int = 0
) -> AsyncIterator[Record]:
    """ludic's own syncs, half of them with `in_flight` completions being generated (0: none of them); with a `rank`, of an
    adapter alone."""
    model = load_masters(policy)
    model = with_adapter(model, rank) if rank else model
    async with open_engine(policy, url, probe=PROBE, adapter_rank=rank) as engine:
        for version in range(syncs * (2 if in_flight else 1)):
            load = in_flight if version >= syncs else 0
            async with contextlib.AsyncExitStack() as stack:
                if load:
                    await stack.enter_async_context(generating(engine, load))
                change_a_little(model)
                report = await engine.update_weights(PolicyWeights(model, version))
            counted = sum(seconds for name, seconds in report.phases_s.items() if name not in UNCOUNTED)
            yield {
                "step": version % syncs + 1,
                "in_flight": load,
                "seconds": counted,
                "phases": report.phases_s,
                "gib": report.num_bytes / 2**30,
                "proof": report.proof,
            }


@contextlib.asynccontextmanager
async def generating(engine: InferenceEngine, completions: int) -> AsyncIterator[None]:
    """Keep completions in flight for the length of the block."""
    sampling = SamplingParams(max_tokens=256, logprobs=False, seed=0)
    tasks = [
        asyncio.create_task(engine.generate([*PROBE, number], num_completions=8, sampling=sampling))
        for number in range(max(1, completions // 8))
    ]
    await asyncio.sleep(0.2)  # until they are being decoded
    try:
        yield
    finally:
        await asyncio.gather(*tasks)


def vllm_syncs(policy: Path, url: str, *, syncs: int) -> list[Record]:
    """vLLM's packed NCCL broadcast as its own client would drive it."""
    import torch

    from benchmarks.peers.vllm_nccl import NCCLTransport
    from ludic.inference.client.server_control import ServerControl
    from ludic.inference.weights.weight_transport import WireWeights

    model = load_masters(policy)
    weights = WireWeights(model=model, dtype=torch.bfloat16)
    control = ServerControl(url)
    transport = NCCLTransport(control, weights)
    rows = []
    for step in range(1, syncs + 1):
        change_a_little(model)
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        control.pause(drain=True)
        marks.append(time.perf_counter())
        transport.send(weights)
        marks.append(time.perf_counter())
        control.resume()
        marks.append(time.perf_counter())
        pause, send, resume = (after - before for before, after in itertools.pairwise(marks))
        phases = {"pause": pause, "send": send, "resume": resume}
        gib = weights.num_bytes() / 2**30
        rows.append({"step": step, "in_flight": 0, "seconds": marks[-1] - marks[0], "phases": phases, "gib": gib})
    transport.close()
    return rows


async def worker(args: argparse.Namespace) -> None:
    hide_loading_bars()
    if args.worker == "nccl":
        for row in vllm_syncs(args.policy, args.url, syncs=args.syncs):
            emit(row)
        return
    rank = args.lora_rank if args.worker == "adapter" else 0
    async for row in proven_syncs(args.policy, args.url, syncs=args.syncs, in_flight=args.in_flight, rank=rank):
        emit(row)


async def collect(args: argparse.Namespace, policy: Path) -> list[Record]:
    """Syncs with the engine of this process, which needs no other."""
    return [row async for row in proven_syncs(policy, None, syncs=args.syncs, in_flight=args.in_flight)]


# -- the parts and the table -----------------------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> None:
    """Make the policies, start all servers at once, and record each shape's syncs as they are done."""
    from ludic.inference.client.handshake import largest_rank  # brings an HTTP client, which --help need not wait for

    check_common_arguments(args)
    if args.lora_rank and (args.engine == "local" or args.server):
        raise ValueError(f"--lora-rank {args.lora_rank} starts two servers: leave out --engine local and --server")
    records = records_of(args)
    records.add("machine", **machine())
    serving_gpu, training_gpu = gpus_for(args.device)
    shapes = args.shapes.split(",")
    policies = {}
    for args.shape in shapes:
        policies[args.shape] = ensure_policy(args, random=True, gpu=training_gpu)
    kinds = ("ludic", "nccl") if args.device == "cuda" and not args.server else ("ludic",)
    if args.lora_rank:  # three servers of each shape do not fit on a GPU
        kinds = ("ludic", "adapter")
    settings = vllm_settings(device=args.device, max_model_len=512, gpu_share=GPU_SHARE, kv_cache_gib=KV_CACHE_GIB)
    settings["enforce_eager"] = True  # a sync does not run the compiled graphs, which take half of a server's start
    of_kind = {
        "ludic": settings,
        "nccl": {**settings, "weight_transfer_config": json.dumps({"backend": "nccl"})},
        "adapter": {**settings, "enable_lora": True, "max_lora_rank": largest_rank(args.lora_rank)},
    }
    specs = [
        ludic_server(policies[shape], of_kind[kind], gpu=serving_gpu, name=f"{kind}_{shape}")
        for shape in shapes
        for kind in kinds
        if args.engine == "vllm" and not args.server
    ]
    with serving(specs, log_dir=args.out) as started:
        servers = {f"ludic_{shape}": args.server for shape in shapes} if args.server else started
        for shape in shapes:
            for kind in kinds:
                name = f"{kind}_{shape}"
                if args.engine == "vllm" and name not in servers:
                    records.add(name, rows=[], problem="the server did not come up")
                    continue
                if args.engine == "local":
                    records.add(name, rows=asyncio.run(collect(args, policies[shape])), problem=None)
                    continue
                flags = ["--worker", kind, "--policy", str(policies[shape]), "--syncs", str(args.syncs)]
                flags += ["--lora-rank", str(args.lora_rank)]
                flags += ["--in-flight", str(args.in_flight), *(["--url", servers[name]] if name in servers else [])]
                command = [sys.executable, "-m", "benchmarks.sync", *flags]
                try:
                    rows = run_part(
                        command, log_path=args.out / f"sync_{name}.log", deadline_s=args.deadline, gpu=training_gpu
                    )
                    records.add(name, rows=[row for row in rows if "step" in row], problem=rows[-1].get("cut_off"))
                    say(f"{name}: {len(rows)} syncs")
                except PartError as error:  # the other shapes are still worth their time
                    say(f"{name} failed: {error}")
                    records.add(name, rows=[], problem=str(error))


def write_table(args: argparse.Namespace) -> None:
    """OUT/sync.md from the records."""
    records = records_of(args).last()
    on = records.pop("machine")
    whole, phases = [], []
    for name, record in records.items():
        kind, _, shape = name.partition("_")
        for load in sorted({row["in_flight"] for row in record["rows"]}):
            rows = [row for row in record["rows"] if row["in_flight"] == load and row["step"] > args.skip]
            words = f"{shape}, {WHO[kind]}{f', {load} completions in flight' if load else ''}"
            seconds = [row["seconds"] for row in rows]
            whole.append(
                [
                    words,
                    median(seconds),
                    percentile(seconds, 0.9),
                    max(seconds, default=None),
                    rows[0]["gib"],
                    len(rows),
                ]
            )
            phases.append([words, phase_words(rows)])
    sections = [
        markdown_table(["", "median s", "p90 s", "most s", "GiB sent", "syncs"], whole),
        markdown_table(["", "phases, medians in s"], phases),
    ]
    sections += [f"{name}: {record['problem']}." for name, record in records.items() if record.get("problem")]
    write_report(args.out / "sync.md", "Weight sync, pause to resume", on, sections)


def phase_words(rows: Sequence[Record]) -> str:
    names = dict.fromkeys(name for row in rows for name in row["phases"] if name not in UNCOUNTED)
    medians = {name: median([row["phases"][name] for row in rows if name in row["phases"]]) for name in names}
    return ", ".join(f"{name} {seconds:.4f}" for name, seconds in medians.items())


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.worker:
        asyncio.run(worker(args))
        return 0
    return run_and_write(args, lambda: measure_all(args), write_table)


if __name__ == "__main__":
    sys.exit(main())

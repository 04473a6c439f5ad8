"""Seconds of a weight sync, from pause to resume, by its phases; and of vLLM's own NCCL transfer in the same run.

    python benchmarks/sync.py --dataset DIR --out OUT            two GPUs; the 0.5B and the 1.5B shape with random weights
    python benchmarks/sync.py --dataset DIR --out OUT --lora-rank 16            an adapter of rank 16 against whole models
    CUDA_VISIBLE_DEVICES=0 python benchmarks/sync.py ...         one GPU: the rows of one GPU alone

For each shape a server of ludic, without compilation, comes up on GPU 0; the trainer's half is a process on GPU 1. For the first
shape there are two more on GPU 0: one with vLLM's own `nccl` backend, and one whose trainer's half is on GPU 0 too, which is
sent weights by turns over CUDA IPC and over shared memory. Trainers load while servers start, and measure one after the other
once all are up. ludic's syncs are proven and, between two GPUs, measured twice: with an idle server, and with generation in
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
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import (
    Record,
    Records,
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
from benchmarks.parts import Prepared
from benchmarks.processes import (
    PartError,
    Servers,
    ServerSpec,
    ensure_policy,
    gpus_for,
    ludic_server,
    run_and_write,
    vllm_settings,
)
from ludic.cli import hide_loading_bars
from ludic.rollout.engine import InferenceEngine, PolicyWeights, WeightSyncReport
from ludic.types import SamplingParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

UNCOUNTED = ("open", "probe", "wait")
PROBE = list(range(5, 60))
GPU_SHARE, KV_CACHE_GIB = 0.2, 6.0
OVER_IPC = "CUDA IPC"
WHO = {
    "ludic": "ludic, proven",
    "adapter": "ludic, an adapter alone, proven",
    "nccl": "vLLM's own, not proven",
    OVER_IPC: "one GPU, ludic over CUDA IPC, proven",
    "shared memory": "one GPU, ludic over shared memory, proven",
}


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
    model: PreTrainedModel, policy: Path, url: str | None, *, syncs: int, in_flight: int, rank: int = 0
) -> AsyncIterator[Record]:
    """ludic's own syncs, half of them with `in_flight` completions being generated (0: none of them); with a `rank`, of an
    adapter alone."""
    model = with_adapter(model, rank) if rank else model
    async with open_engine(policy, url, probe=PROBE, adapter_rank=rank) as engine:
        for version in range(syncs * (2 if in_flight else 1)):
            load = in_flight if version >= syncs else 0
            async with contextlib.AsyncExitStack() as stack:
                if load:
                    await stack.enter_async_context(generating(engine, load))
                change_a_little(model)
                report = await engine.update_weights(PolicyWeights(model, version))
            yield row_of(report, step=version % syncs + 1, in_flight=load)


def row_of(report: WeightSyncReport, *, step: int, in_flight: int = 0) -> Record:
    return {
        "step": step,
        "in_flight": in_flight,
        "seconds": sum(seconds for name, seconds in report.phases_s.items() if name not in UNCOUNTED),
        "phases": report.phases_s,
        "gib": report.num_bytes / 2**30,
        "proof": report.proof,
    }


def one_gpu_syncs(model: PreTrainedModel, policy: Path, url: str, *, syncs: int) -> Iterator[Record]:
    """ludic's syncs with a server on the trainer's own GPU, by turns as they are there and over shared memory alone."""
    import torch

    from ludic.inference.client import handshake
    from ludic.inference.client.server_control import ServerControl
    from ludic.inference.weights.weight_sync import WeightSync

    control = ServerControl(url)
    info = handshake.weight_sync_info(control, str(policy))
    ways = {
        way: WeightSync(
            control,
            transport=info["transfer_backend"],
            served_model=str(policy),
            dtype=getattr(torch, info["dtype"]),
            probe_token_ids=PROBE,
            server_gpu=gpu,
        )
        for way, gpu in ((OVER_IPC, info["device_uuid"]), ("shared memory", ""))
    }
    for step in range(1, syncs + 1):
        for way, sync in ways.items():
            change_a_little(model)
            report = sync.sync(model, step)
            yield {"way": way, **row_of(report, step=step)}
            if step > 1 and way not in report.proof:  # the first sync of either is a reload from shared memory
                raise PartError(f"a sync went another way than over {way}: {report.proof}")
    for sync in ways.values():
        sync.close()


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
        for task in tasks:  # waiting for their ends took most of the minutes of this benchmark
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


def vllm_syncs(model: PreTrainedModel, url: str, *, syncs: int) -> list[Record]:
    """vLLM's packed NCCL broadcast as its own client would drive it."""
    import torch

    from benchmarks.peers.vllm_nccl import NCCLTransport
    from ludic.inference.client.server_control import ServerControl
    from ludic.inference.weights.weight_transport import WireWeights

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
    """Load, say so, wait for the server's address, and sync with it."""
    hide_loading_bars()
    model = load_masters(args.policy)
    emit({"loaded": True})
    url = sys.stdin.readline().strip()
    if args.worker in ("ludic", "adapter"):
        rank = args.lora_rank if args.worker == "adapter" else 0
        async for row in proven_syncs(model, args.policy, url, syncs=args.syncs, in_flight=args.in_flight, rank=rank):
            emit(row)
        return
    kind = {"nccl": lambda: vllm_syncs(model, url, syncs=args.syncs)}.get(
        args.worker, lambda: one_gpu_syncs(model, args.policy, url, syncs=args.syncs)
    )
    for row in kind():
        emit(row)


async def collect(args: argparse.Namespace, policy: Path) -> list[Record]:
    """Syncs with the engine of this process, which needs no other."""
    syncs = proven_syncs(load_masters(policy), policy, None, syncs=args.syncs, in_flight=args.in_flight)
    return [row async for row in syncs]


# -- the parts and the table -----------------------------------------------------------------------------------------------


def kinds_of(args: argparse.Namespace, shape: str, num_gpus: int) -> tuple[str, ...]:
    """What is measured of a shape: the peer and one GPU of the first alone, as each costs a server."""
    if args.lora_rank:
        return ("ludic", "adapter")
    if args.device == "cpu" or args.server:
        return ("ludic",)
    first = shape == args.shapes.split(",")[0]
    if num_gpus == 1:
        return ("one_gpu",) if first else ()
    return ("ludic", "nccl", "one_gpu") if first else ("ludic",)


def server_of(args: argparse.Namespace, kind: str, shape: str, policy: Path, gpu: int | None) -> ServerSpec:
    settings = vllm_settings(device=args.device, max_model_len=512, gpu_share=GPU_SHARE, kv_cache_gib=KV_CACHE_GIB)
    settings["enforce_eager"] = True  # a sync does not run the compiled graphs, which take half of a server's start
    if backend := {"nccl": "nccl", "one_gpu": "ludic_shm"}.get(kind):
        settings["weight_transfer_config"] = json.dumps({"backend": backend})
    if kind == "adapter":
        from ludic.inference.client.handshake import (
            largest_rank,  # brings an HTTP client, which --help need not wait for
        )

        settings |= {"enable_lora": True, "max_lora_rank": largest_rank(args.lora_rank)}
    return ludic_server(policy, settings, gpu=gpu, name=f"{kind}_{shape}")


def measure_all(args: argparse.Namespace) -> None:
    """Make the policies side by side, start each one's servers and trainers when it is there, and measure one by one."""
    check_common_arguments(args)
    if args.lora_rank and (args.engine == "local" or args.server):
        raise ValueError(f"--lora-rank {args.lora_rank} starts two servers: leave out --engine local and --server")
    records = records_of(args)
    records.add("machine", **machine())
    serving_gpu, training_gpu = gpus_for(args.device)
    num_gpus = len({serving_gpu, training_gpu})
    shapes = args.shapes.split(",")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers, trainers = Servers(stack, args.out), dict[str, Prepared]()
        made = {
            shape: pool.submit(
                ensure_policy, argparse.Namespace(**{**vars(args), "shape": shape}), random=True, gpu=training_gpu
            )
            for shape in shapes
            if kinds_of(args, shape, num_gpus)
        }
        for shape, policy in made.items():
            if args.engine == "local":
                records.add(f"ludic_{shape}", rows=asyncio.run(collect(args, policy.result())), problem=None)
                continue
            for kind in kinds_of(args, shape, num_gpus):
                gpu = serving_gpu if kind == "one_gpu" else training_gpu
                if not args.server:
                    servers.start([server_of(args, kind, shape, policy.result(), serving_gpu)])
                flags = ["--worker", kind, "--policy", str(policy.result()), "--syncs", str(args.syncs)]
                flags += ["--in-flight", str(args.in_flight), "--lora-rank", str(args.lora_rank)]
                command = [sys.executable, "-m", "benchmarks.sync", *flags]
                log_path = args.out / f"sync_{kind}_{shape}.log"
                trainers[f"{kind}_{shape}"] = Prepared(stack, command, log_path=log_path, gpu=gpu)
        urls = dict.fromkeys(trainers, args.server) if args.server else servers.healthy()
        for name, trainer in trainers.items():
            measure(records, name, trainer, urls.get(name), deadline_s=args.deadline)
        servers.end()


def measure(records: Records, name: str, trainer: Prepared, url: str | None, *, deadline_s: float) -> None:
    """Record one trainer's syncs; what goes wrong costs its own rows only."""
    if url is None:
        records.add(name, rows=[], problem="the server did not come up")
        return
    try:
        rows = trainer.records(url, deadline_s=deadline_s)
        records.add(name, rows=[row for row in rows if "step" in row], problem=rows[-1].get("cut_off"))
        say(f"{name}: {len(rows)} syncs")
    except PartError as error:
        say(f"{name} failed: {error}")
        records.add(name, rows=[], problem=str(error))


def write_table(args: argparse.Namespace) -> None:
    """OUT/sync.md from the records."""
    records = records_of(args).last()
    on = records.pop("machine")
    whole, phases, medians = [], [], dict[tuple[str, str, int], float]()
    for name, record in records.items():
        kind, _, shape = name.rpartition("_")
        sides = {(row.get("way", kind), row["in_flight"]) for row in record["rows"]}
        for side, load in sorted(sides):
            rows = [row for row in record["rows"] if (row.get("way", kind), row["in_flight"]) == (side, load)]
            rows = [row for row in rows if row["step"] > args.skip]
            words = f"{shape}, {WHO[side]}{f', {load} completions in flight' if load else ''}"
            seconds = [row["seconds"] for row in rows]
            most, gib = max(seconds, default=None), rows[0]["gib"] if rows else None
            whole.append([words, median(seconds), percentile(seconds, 0.9), most, gib, len(rows)])
            phases.append([words, phase_words(rows)])
            medians[shape, side, load] = median(seconds)
    sections = [
        markdown_table(["", "median s", "p90 s", "most s", "GiB sent", "syncs"], whole),
        markdown_table(["", "phases, medians in s"], phases),
    ]
    sections += [
        f"{shape}, one GPU: shared memory takes {seconds / medians[shape, OVER_IPC, 0]:.1f} times what CUDA IPC takes."
        for (shape, side, _), seconds in medians.items()
        if side == "shared memory"
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

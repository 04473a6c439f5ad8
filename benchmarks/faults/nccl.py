"""A server that stops or dies in the middle of a weight sync over NCCL: two GPUs, the server on the first.

    python -m benchmarks.faults.nccl --model DIR [--out OUT]           8 minutes at most; DIR: any policy, e.g. of make_policy.py

SIGSTOP (10 times) and SIGKILL (twice, since a start takes a minute or two) at a random moment of a sync. Each time: the sync
must raise within its deadline, the trainer's GPU must compute, and after SIGCONT or a new start the next sync must be proven.
Every other stop is told to the sync by `abort`, as a trainer that watches its server would. Prints a JSON line an injection.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.faults.outcome import Injection
from ludic.inference.client.server_process import ServerProcess
from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ludic.inference.weights.weight_sync import WeightSync

ROW = "server stopped or killed in a sync over NCCL"
PROBE = list(range(5, 60))
CLEANING_S = 12.0
"""What a sync may take beyond its deadline and `SETTLE_S`: tearing NCCL down and leaving the server paused."""
SERVER_ARGS = (
    *("--max-model-len", "512", "--gpu-memory-utilization", "0.3", "--enforce-eager"),
    *("--weight-transfer-config", '{"backend": "ludic_nccl"}'),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a policy's folder")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder for the server's log")
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=15.0, help="of a sync, in seconds (default: 15)")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing more is injected")
    parser.add_argument("--start-s", type=float, default=130.0, help="what a start of the server may take of these")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Rig:
    """The trainer's half, on the second GPU."""

    def __init__(self, args: argparse.Namespace, server: ServerProcess) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from ludic.train.attention import prepare_packed_attention

        self.rng = random.Random(args.seed)
        self.device = torch.device("cuda:1")
        torch.cuda.set_device(self.device)
        policy: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.policy = torch.nn.Module.to(policy, self.device)
        prepare_packed_attention(self.policy)
        self.server = server
        self.deadline_s = args.deadline
        self.version = 0
        self.sync_s = 0.1
        self.model = str(args.model)
        self.syncer = self.new_syncer(120.0)  # the first sync also loads NCCL

    def new_syncer(self, deadline_s: float) -> WeightSync:
        import torch

        from ludic.inference.client.server_control import ServerControl
        from ludic.inference.weights.weight_sync import WeightSync

        return WeightSync(
            ServerControl(self.server.base_url),
            transport="ludic_nccl",
            served_model=self.model,
            dtype=torch.bfloat16,
            probe_token_ids=PROBE,
            deadline_s=deadline_s,
        )

    def sync(self) -> WeightSyncReport:
        self.version += 1
        change(self.policy, self.rng)
        return self.syncer.sync(self.policy, self.version)

    def steady(self) -> None:
        """Two syncs, the second in place, whose length says when to strike."""
        self.sync()
        self.sync_s = self.sync().seconds

    def strike(self, strike: Callable[[], None], *, tell: bool) -> tuple[str, float, bool]:
        """A sync, and a strike at a random moment of it: what it raised ("" for nothing), the seconds, whether in time."""
        from ludic.inference.weights.background import BackgroundCall
        from ludic.inference.weights.weight_sync import SETTLE_S

        change(self.policy, self.rng)
        self.version += 1
        syncing = BackgroundCall(lambda: self.syncer.sync(self.policy, self.version))
        time.sleep(self.rng.uniform(0.0, 0.9) * self.sync_s)
        strike()
        started = time.monotonic()
        if tell:
            threading.Timer(1.0, lambda: self.syncer.abort("its process was stopped")).start()
        allowed = (1.5 if tell else self.deadline_s) + SETTLE_S + CLEANING_S
        try:
            syncing.result(allowed + 20.0)
        except EngineError as error:
            seconds = time.monotonic() - started
            return str(error), seconds, seconds <= allowed
        except TimeoutError:
            return "it never ended", time.monotonic() - started, False
        return "", time.monotonic() - started, True

    def gpu_problem(self) -> str:
        """Why the trainer's GPU does not compute; "" if it does. A kernel that spins would keep it for ever."""

        import torch

        from ludic.inference.weights.background import BackgroundCall

        def compute() -> float:
            torch.cuda.set_device(self.device)
            square = torch.ones(4096, 4096, device=self.device)
            total = (square @ square).sum().item()
            torch.cuda.synchronize(self.device)
            return total

        try:
            total = BackgroundCall(compute).result(20.0)
        except TimeoutError:
            return "the trainer's GPU is stuck"
        except RuntimeError as error:
            return f"the trainer's GPU failed: {error}"
        return "" if total == 4096.0**3 else f"the trainer's GPU computed {total}"

    def proven_again(self, patience_s: float) -> tuple[str, float]:
        """Sync until it is proven: why it was not within `patience_s` ("" if it was), and the seconds that it took."""
        started, problem = time.monotonic(), "never tried"
        while time.monotonic() - started < patience_s:
            try:
                report = self.sync()
            except EngineError as error:
                problem = str(error)
                time.sleep(0.5)
                continue
            proven = report.proof.count("digests of those sent") == 1
            return "" if proven else f"not proven: {report.proof}", time.monotonic() - started
        return problem, time.monotonic() - started


def change(model: PreTrainedModel, rng: random.Random) -> None:
    """Every tensor, on its device, a little."""
    import torch

    with torch.no_grad():
        factor = 1.0 + rng.choice((-1, 1)) * rng.uniform(0.01, 0.02)
        for parameter in model.parameters():
            parameter.mul_(factor).add_(1e-4)


def signal_group(server: ServerProcess, number: signal.Signals) -> Callable[[], None]:
    return lambda: os.killpg(server.pid, number)


def inject(rig: Rig, fault: signal.Signals, *, tell: bool) -> Injection:
    """One strike, and the way back."""
    error, seconds, in_time = rig.strike(signal_group(rig.server, fault), tell=tell)
    gpu = rig.gpu_problem()
    if fault is signal.SIGSTOP:
        os.killpg(rig.server.pid, signal.SIGCONT)
    else:
        rig.server.restart("killed on purpose")
    again, back_s = rig.proven_again(60.0)
    problems = [
        "" if in_time else f"raised late ({seconds:.1f} s): {error}",
        gpu,
        f"not proven afterwards: {again}" if again else "",
    ]
    bad = "; ".join(problem for problem in problems if problem)
    raised = "raised in time" if error else "the sync had just ended"
    if not again:
        rig.steady()
    say(f"{fault.name}: {error or 'no error'} ({seconds:.1f} s); proven again after {back_s:.1f} s")
    name = f"{fault.name}{', sync told' if tell else ''}"
    return Injection(
        row=ROW, fault=name, outcome=bad or f"{raised}, GPU free, proven again", ok=not bad, seconds=seconds
    )


def say(text: str) -> None:
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stderr.flush()


def run(args: argparse.Namespace) -> list[Injection]:
    started = time.monotonic()
    end = started + 60.0 * args.minutes
    server = ServerProcess(
        str(args.model),
        gpu=0,
        extra_args=SERVER_ARGS,
        log_path=args.out / "nccl_faults_server.log",
        timeout_s=300.0,
        env={"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"},
    )
    injections: list[Injection] = []
    try:
        server.start()
        say(f"the server is up after {time.monotonic() - started:.0f} s")
        rig = Rig(args, server)
        rig.sync()
        rig.syncer.close()
        rig.syncer = rig.new_syncer(rig.deadline_s)
        rig.steady()
        say(f"a sync takes {rig.sync_s:.3f} s")
        plan = [(signal.SIGSTOP, bool(number % 2)) for number in range(args.stops)]
        plan[args.stops // 2 : args.stops // 2] = [(signal.SIGKILL, False)] * min(1, args.kills)
        plan += [(signal.SIGKILL, False)] * max(0, args.kills - 1)
        for fault, tell in plan:
            needed = 60.0 + (args.start_s if fault is signal.SIGKILL else 0.0)
            if time.monotonic() + needed > end:
                say(f"no time for another {fault.name}")
                continue
            injections.append(inject(rig, fault, tell=tell))
            sys.stdout.write(json.dumps(dataclasses.asdict(injections[-1])) + "\n")
            sys.stdout.flush()
    finally:
        server.close()
    return injections


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch  # --help and wrong flags answer without it

    args.out.mkdir(parents=True, exist_ok=True)
    if torch.cuda.device_count() < 2:
        build_parser().error(f"two GPUs are needed, {torch.cuda.device_count()} are seen")
    injections = run(args)
    kept = sum(one.ok for one in injections)
    say(f"{kept} of {len(injections)} as promised")
    sys.stderr.flush()
    # Not a plain return: a thread that was left behind in NCCL must not hold the interpreter's end.
    sys.stdout.flush()
    os._exit(int(kept < len(injections) or not injections))


if __name__ == "__main__":
    main()

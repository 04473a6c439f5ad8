"""The server killed, stopped and started again under a living trainer: it must get it back and train on no lie.

One run of `GRPOTrainer` with `RecoveringEngine` on a real server meets one fault after another, each at a chosen update and
in a chosen phase: while rollouts are generated, in the middle of a weight sync, between two updates. The server is either
the run's own, which it must start again, or somebody else's: then this program is the person who starts it again, with the
weights that it was first started with. A server is stopped with SIGSTOP, and for somebody else's continued later.

Then the books are checked: no update is missing, no rollout is doubled or lost, every rollout has the version of the policy
that it trains, and the log-probs of every sampled token agree with the policy's. The last is what would show rollouts of
other weights: `--lr` is high enough for the policies of two updates to differ.

    python -m benchmarks.faults.server_lost --model POLICY --dataset GSM8K --out runs/lost [--rounds 2] [--by-hand]

With two GPUs the server takes the first and training the second. Vary `--seed` for other instants.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.faults.outcome import Injection
from benchmarks.harness import HashRewardGSM8K
from environments.gsm8k import load
from ludic.cli import hide_loading_bars
from ludic.config import GRPOConfig, RunPaths
from ludic.inference.client.server_process import ServerProcess, start_server
from ludic.task.pretrained import load_config, load_model
from ludic.task.prompts import encode_prompt, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from benchmarks.faults.phased_engine import PhasedEngine
    from ludic.survival.recovery import RecoveringEngine
    from ludic.train.trainer import GRPOTrainer

ROW = "server lost"
Phase = Literal["generation", "sync", "between updates"]
Act = Literal["killed", "stopped"]
GAP_LIMIT = 0.1
"""Nats. Mean log-prob gap above which an update was sampled by other weights: bf16 against fp32 makes 0.005 to 0.02."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to the server at one update."""

    update: int
    phase: Phase
    act: Act


def plan(rounds: int, *, stops: bool = True, most: int | None = None) -> list[Fault]:
    """The first `most` faults of a run, two updates apart so that the run gets on its feet in between."""
    acts: list[tuple[Phase, Act]] = [("generation", "killed"), ("sync", "killed"), ("between updates", "killed")]
    if stops:
        acts += [("generation", "stopped"), ("sync", "stopped")]
    chosen = (acts * rounds)[:most]
    return [Fault(update=2 * number + 2, phase=phase, act=act) for number, (phase, act) in enumerate(chosen)]


class Metrics:
    """A `MetricLogger` that keeps the rows of updates."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        if "reward_mean" in metrics:
            self.rows[step] = dict(metrics)

    def event(self, step: int, message: str, /) -> None:
        sys.stderr.write(f"{step}: {message}\n")

    def close(self) -> None: ...


class Saboteur:
    """Does to the server what the plan says, and, where the server is not the run's, what a person would do then."""

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        server: ServerProcess,
        engine: RecoveringEngine,
        client: PhasedEngine,
        trainer: GRPOTrainer[Any],
        by_hand: bool,
        seed: int,
        log: list[str],
    ) -> None:
        self.faults, self.server, self.engine, self.client, self.trainer = faults, server, engine, client, trainer
        self.by_hand, self.log = by_hand, log
        self._random = random.Random(seed)
        self.done: list[tuple[Fault, float]] = []

    async def work(self) -> None:
        for fault in self.faults:
            await self._await_phase(fault)
            losses = self.engine.counts()["server_recoveries"]
            started = time.monotonic()
            self._signal(signal.SIGKILL if fault.act == "killed" else signal.SIGSTOP)
            while self.engine.counts()["server_recoveries"] == losses:
                await asyncio.sleep(0.02)
                if self.by_hand and fault.phase == "between updates" and time.monotonic() - started > 0.1:
                    break  # nobody may notice while nothing is asked of it: the person is quick
            if self.by_hand:
                await self._help(fault)
            synced = self.trainer.state.policy_version
            while self.engine.counts()["server_recoveries"] == losses or self.engine._synced_life != self.engine._life:
                await asyncio.sleep(0.02)
            self.done.append((fault, time.monotonic() - started))
            self.log.append(f"{fault} at version {synced}: recovered after {self.done[-1][1]:.1f} s")

    async def _await_phase(self, fault: Fault) -> None:
        while self.trainer.state.step < fault.update - (fault.phase == "generation"):
            await asyncio.sleep(0.001)
        if fault.phase == "sync":
            # The sync of this update: its step is counted just before.
            while not self.client.phases["sync"]:
                await asyncio.sleep(0)
            await asyncio.sleep(self._random.uniform(0.0, 0.03))
        elif fault.phase == "generation":
            while not self.client.phases["generation"]:
                await asyncio.sleep(0.001)
            await asyncio.sleep(self._random.uniform(0.0, 0.2))
        else:
            while self.client.phases["generation"] or self.client.phases["sync"]:
                await asyncio.sleep(0)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.server.pid, number)

    async def _help(self, fault: Fault) -> None:
        if fault.act == "stopped":
            await asyncio.sleep(2.0)
            self._signal(signal.SIGCONT)
        else:
            await asyncio.to_thread(self.server.restart, "a person started it again")


async def inject(
    faults: Sequence[Fault],
    *,
    model: Path,
    dataset: Path,
    folder: Path,
    by_hand: bool,
    seed: int,
    server: ServerProcess,
    silent_s: float = 10.0,
    config: GRPOConfig,
) -> list[Injection]:
    """One run with these faults; an `Injection` for each, and one for the books of the whole run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(config, train_steps=faults[-1].update + 2)
    tokenizer = load_tokenizer(model)
    log: list[str] = []
    metrics = Metrics()
    with silence_after(silent_s):
        async with opened(model, folder, server, by_hand, tokenizer, log) as (client, engine):
            environment = HashRewardGSM8K()
            trainer = make_trainer(model, dataset, folder, tokenizer, engine, environment, metrics, config)
            probe = encode_prompt(tokenizer, trainer.environment.messages(trainer.train_samples[0]))[:64]
            await engine.enable_weight_sync(probe)
            saboteur = Saboteur(
                faults,
                server=server,
                engine=engine,
                client=client,
                trainer=trainer,
                by_hand=by_hand,
                seed=seed,
                log=log,
            )
            training, working = asyncio.create_task(trainer.run()), asyncio.create_task(saboteur.work())
            try:
                await asyncio.wait((training, working), return_when=asyncio.FIRST_COMPLETED)
                if working.done() and working.exception() is not None:
                    working.result()  # what kept this program from doing its part
                await training
            finally:
                for task in (training, working):
                    task.cancel()
                await asyncio.gather(training, working, return_exceptions=True)
                await environment.aclose()
            counts = engine.counts()
    for line in log:
        sys.stderr.write(line + "\n")
    problems = wrong_books(trainer, metrics, config)
    whose = "separately launched" if by_hand else "our own"
    rows = [
        Injection(
            row=f"{ROW} ({whose})",
            fault=f"{fault.act} in {fault.phase}" if fault.phase != "between updates" else f"{fault.act} {fault.phase}",
            outcome="recovered, the run went on",
            ok=not problems,
            seconds=seconds,
        )
        for fault, seconds in saboteur.done
    ]
    rows += [
        Injection(row=f"{ROW} ({whose})", fault=str(fault), outcome="not reached", ok=False)
        for fault in faults[len(saboteur.done) :]
    ]
    checked = f"{config.train_steps} updates whole, {counts['discarded_completions']:.0f} completions asked for again"
    rows.append(
        Injection(row=f"{ROW} ({whose})", fault="books", outcome="; ".join(problems) or checked, ok=not problems)
    )
    return rows


@contextlib.contextmanager
def silence_after(seconds: float) -> Any:
    """A shorter patience than a real run's, so that a stopped server does not cost a minute each."""
    from ludic.survival import recovery

    before = recovery.SILENT_S, recovery.WATCH_S
    recovery.SILENT_S, recovery.WATCH_S = seconds, min(2.0, recovery.WATCH_S)
    try:
        yield
    finally:
        recovery.SILENT_S, recovery.WATCH_S = before


@contextlib.asynccontextmanager
async def opened(
    model: Path,
    folder: Path,
    server: ServerProcess,
    by_hand: bool,
    tokenizer: PreTrainedTokenizerBase,
    log: list[str],
) -> AsyncIterator[tuple[PhasedEngine, RecoveringEngine]]:
    """The engine on a server that runs, which it has as its own or does not know."""
    from benchmarks.faults.phased_engine import PhasedEngine
    from ludic.inference.client import handshake
    from ludic.survival.recovery import RecoveringEngine

    client = PhasedEngine(
        server.base_url,
        model=str(model),
        concurrency=1024,
        vocab_size=load_config(model).get_text_config().vocab_size,
    )
    engine = RecoveringEngine(client, server=None if by_hand else server, out_dir=folder, wait_s=600.0, say=log.append)
    try:
        await engine.connect(tokenizer)
        yield client, engine
    finally:
        await engine.aclose()
        if not by_hand:  # a run ends its own server and need not let go of it; this one may be used again
            await asyncio.to_thread(handshake.release, client.control)


def make_trainer(
    model: Path,
    dataset: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    engine: RecoveringEngine,
    environment: HashRewardGSM8K,
    metrics: Metrics,
    config: GRPOConfig,
) -> GRPOTrainer[Any]:
    """The trainer on the second GPU, or the CPU, with rewards that vary whatever the policy can do."""
    import torch

    from ludic.train.trainer import GRPOTrainer

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", min(1, torch.cuda.device_count() - 1))
        torch.cuda.set_device(device)
    return GRPOTrainer(
        config=config,
        model=torch.nn.Module.to(load_model(model, dtype=torch.float32), device),
        model_name=str(model),
        tokenizer=tokenizer,
        engine=engine,
        environment=environment,
        train_samples=load("train", dataset=dataset),
        eval_samples=[],
        metric_logger=metrics,
        paths=RunPaths(out_dir=folder, name="gsm8k"),
    )


def wrong_books(trainer: GRPOTrainer[Any], metrics: Metrics, config: GRPOConfig) -> list[str]:
    """What the run's files and metrics say that must not be."""
    problems = []
    if trainer.state.step != config.train_steps:
        problems.append(f"the run ended at update {trainer.state.step} of {config.train_steps}")
    rollouts = [json.loads(line) for line in trainer.paths.rollouts.read_text().splitlines()]
    keys = collections.Counter((row["step"], row["group"], row["rollout"]) for row in rollouts)
    expected = set(
        itertools.chain.from_iterable(
            ((step, group, member) for group in range((step - 1) * config.groups_per_update,
                                                     step * config.groups_per_update)
             for member in range(config.group_size))
            for step in range(1, trainer.state.step + 1)
        )
    )  # fmt: skip
    if doubled := [key for key, count in keys.items() if count > 1]:
        problems.append(f"{len(doubled)} rollouts doubled, first {doubled[0]}")
    if keys.keys() != expected:
        problems.append(f"{len(expected - keys.keys())} rollouts lost, {len(keys.keys() - expected)} from nowhere")
    if stale := [
        row for row in rollouts if not row["step"] - 1 - config.max_staleness <= row["policy_version"] < row["step"]
    ]:
        problems.append(f"{len(stale)} rollouts of another version")
    for step, row in metrics.rows.items():
        if not row.get("logprob_gap", 0.0) <= GAP_LIMIT:
            problems.append(f"update {step} was sampled by other weights: log-prob gap {row['logprob_gap']:.3g} nats")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1, help="how often each kind of fault comes")
    parser.add_argument("--faults", type=int, metavar="N", help="only the first N of them (default: all)")
    parser.add_argument("--by-hand", action="store_true", help="the server is somebody else's, who starts it again")
    parser.add_argument("--no-stops", action="store_true", help="kills only")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--max-staleness", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--server-args", default="", help="more flags for the server, separated by spaces")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch  # --help and wrong flags answer without it

    hide_loading_bars()
    config = GRPOConfig(
        rollouts_per_update=args.rollouts,
        max_completion_len=args.max_tokens,
        micro_token_budget=args.budget,
        learning_rate=args.lr,
        warmup_steps=0,
        logprob_share=1.0,
        max_staleness=args.max_staleness,
        eval_limit=0,
        save_every=0,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with start_server(
        str(args.model),
        gpu=0 if torch.cuda.device_count() > 1 else None,
        extra_args=["--max-model-len", "1024", *args.server_args.split()],
        log_path=args.out / "vllm_server.log",
    ) as server:
        rows = asyncio.run(
            inject(
                plan(args.rounds, stops=not args.no_stops, most=args.faults),
                model=args.model,
                dataset=args.dataset,
                folder=args.out,
                by_hand=args.by_hand,
                seed=args.seed,
                server=server,
                config=config,
            )
        )
    for row in rows:
        sys.stdout.write(json.dumps(dataclasses.asdict(row)) + "\n")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

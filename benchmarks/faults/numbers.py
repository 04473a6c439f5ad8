"""NaN and infinity put into the numbers of an update: loss, gradient, log-probs, the sampler's log-probs, rewards.

Two ways. The learner alone takes thousands: beside it a twin trains on the same samples without any fault, and after every
fault both must be equal to the bit, moments of AdamW included, and go on being so. Whole runs of the trainer take a few
each: the skips must be counted, three in a row must end the run with a diagnosis, and no checkpoint may hold anything that
is not finite.

Left out: faults in the hardware that make wrong numbers of finite ones; nothing here would notice them.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import ludic.train.learner as learner_module
import ludic.train.logprobs as logprobs_module
from benchmarks.faults.outcome import Injection
from ludic.config import GRPOConfig, RunPaths
from ludic.rollout.local import LocalEngine
from ludic.task.prompts import load_tokenizer
from ludic.train.checkpoint import list_checkpoints
from ludic.train.learner import Learner
from ludic.train.logprobs import TokenStats
from ludic.train.loss_inputs import LossInputs, LossOutput, LossSettings
from ludic.train.losses import LOSSES
from ludic.train.master_weights import MasterWeights
from ludic.train.trainer import GRPOTrainer
from ludic.train.update_batch import UpdateBatch
from ludic.types import ChatMessage, Completion, ParseResult, SamplingParams, Score, TrainingSample

ROW = "NaN or Inf"
BAD = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
HUGE = 1e30
"""Finite, and nothing that AdamW could square in fp32."""
PLACES = ("loss", "log-prob", "gradient")
CONFIG = GRPOConfig(
    rollouts_per_update=8, group_size=4, max_seq_len=64, max_completion_len=12, micro_token_budget=64, learning_rate=1e-3,
    warmup_steps=0, train_steps=6, eval_limit=0, save_every=1, keep_checkpoints=20,
)  # fmt: skip
_PER_LEARNER = 40
"""Injections into one learner, before another is made with other settings."""
_RUNS_SHARE = 0.1
"""So many of the injections are into whole runs, which take a hundred times as long."""


def inject(count: int, *, seed: int, folder: Path, policy: Path) -> list[Injection]:
    """Put a NaN or an infinity into `count` places, chosen at random, and see what becomes of it.

    Args:
        folder: for the files of the runs.
        policy: a folder with a small policy and its tokenizer, which trains in milliseconds.
    """
    rng = random.Random(seed)
    outcomes: list[Injection] = []
    in_runs = 0
    while len(outcomes) < count:
        left = count - len(outcomes)
        if in_runs <= _RUNS_SHARE * len(outcomes):
            outcomes += (some := _runs(rng, folder / f"run_{len(outcomes)}", policy, left))
            in_runs += len(some)
        else:
            outcomes += _on_learner(rng, policy, min(_PER_LEARNER, left))
    return outcomes


# -- the faults ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fault(
    learner: Learner, place: str, value: float, rng: random.Random, *, epoch: int = 0, row: int = 0
) -> Iterator[None]:
    """Put `value` into one place of the learner's next update: in one epoch, and in one of its micro-batches."""
    hit = _Nth(learner, epoch, row)
    if place == "gradient":
        poisoned = _bad_gradient(learner, value, rng, epoch)
    elif place == "loss":
        poisoned = _bad_loss(learner, value, hit)
    else:
        poisoned = _bad_logprob(value, rng, hit)
    with poisoned:
        yield


@contextlib.contextmanager
def _bad_gradient(learner: Learner, value: float, rng: random.Random, epoch: int) -> Iterator[None]:
    apply, calls = learner._apply, iter(range(100))

    def poisoned(*arguments: Any) -> Any:
        if next(calls) == epoch:
            masters = [master for master in learner.masters.parameters if master.grad is not None]
            grad = rng.choice(masters).grad
            assert grad is not None
            grad.view(-1)[rng.randrange(grad.numel())] = value
        return apply(*arguments)

    with _replaced(learner, "_apply", poisoned):
        yield


@contextlib.contextmanager
def _bad_loss(learner: Learner, value: float, hit: Callable[[], bool]) -> Iterator[None]:
    loss = learner._loss.loss

    def poisoned(inputs: LossInputs, settings: LossSettings) -> LossOutput:
        output = loss(inputs, settings)
        if not hit():
            return output
        broken = output.loss * value
        return LossOutput(loss=broken, metrics={**output.metrics, "loss": broken.detach()})

    with _replaced(learner, "_loss", dataclasses.replace(learner._loss, loss=poisoned)):
        yield


@contextlib.contextmanager
def _bad_logprob(value: float, rng: random.Random, hit: Callable[[], bool]) -> Iterator[None]:
    compute = logprobs_module.token_logprobs

    def poisoned(model: PreTrainedModel, row: Any, **settings: Any) -> TokenStats:
        stats = compute(model, row, **settings)
        if not hit():
            return stats
        broken = torch.zeros_like(stats.logprobs)
        broken[row.target_positions[rng.randrange(row.num_loss_tokens)]] = value
        return stats._replace(logprobs=stats.logprobs + broken)

    with _replaced(learner_module, "token_logprobs", poisoned):
        yield


class _Nth:
    """True once: for one micro-batch, by its number, of one epoch."""

    def __init__(self, learner: Learner, epoch: int, row: int) -> None:
        self._learner, self._epoch, self._left = learner, epoch, row

    def __call__(self) -> bool:
        if len(self._learner._steps) != self._epoch:  # of this update, so far
            return False
        self._left -= 1
        return self._left == -1


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


# -- on the learner alone ------------------------------------------------------------------------------------------------


def _on_learner(rng: random.Random, policy: Path, count: int) -> list[Injection]:
    """A learner that meets faults, and its twin that meets none."""
    loss = rng.choice(sorted(LOSSES))
    config = dataclasses.replace(
        CONFIG,
        loss=loss,
        epochs_per_update=rng.choice((1, 1, 2, 3)),
        tis_cap=rng.choice((0.0, 2.0)),
        max_grad_norm=rng.choice((0.0, 1.0)),
        weight_decay=rng.choice((0.0, 0.01)),
    )
    in_bf16 = rng.random() < 0.5
    learner, twin = (make_learner(config, policy, in_bf16=in_bf16) for _ in range(2))
    outcomes = []
    for _ in range(count):
        place, (name, value) = rng.choice(PLACES), rng.choice(sorted(BAD.items()))
        if place == "gradient" and rng.random() < 0.25:
            name, value = "1e30", HUGE
        epoch = rng.randrange(config.epochs_per_update)
        samples = make_samples(rng)
        problem = _one_fault(learner, twin, samples, place, value, rng, epoch)
        outcomes.append(
            Injection(
                row=ROW,
                fault=f"{name} in the {place}" + (" of a later epoch" if epoch else ""),
                outcome=problem or ("the epoch left out, earlier ones kept" if epoch else "update skipped and counted"),
                ok=problem is None,
            )
        )
    return outcomes


def _one_fault(
    learner: Learner,
    twin: Learner,
    samples: Sequence[TrainingSample],
    place: str,
    value: float,
    rng: random.Random,
    epoch: int,
) -> str | None:
    """What went wrong, None where the promise was kept."""
    with fault(learner, place, value, rng, epoch=epoch, row=rng.randrange(2)):
        try:
            figures = update(learner, samples)
        except FloatingPointError as error:
            return f"let through, and the weights were lost: {error}"
    if epoch:  # the twin makes the epochs before it and no more
        with _replaced(twin, "config", dataclasses.replace(twin.config, epochs_per_update=epoch)):
            update(twin, samples)
    if figures["skipped_update"] != float(epoch == 0):
        return "not skipped" if not epoch else "the whole update was skipped"
    if epoch and figures["skipped_steps"] != learner.config.epochs_per_update - epoch:
        return f"{figures['skipped_steps']:.0f} epochs counted as skipped"
    if not all(map(math.isfinite, figures.values())):
        return "a figure that is not finite was logged"
    if "not finite" not in learner.diagnosis() and "beyond" not in learner.diagnosis():
        return "the diagnosis says nothing"
    if not same(learner, twin):
        return "weights or optimizer state were touched"
    healthy = make_samples(rng)
    if update(learner, healthy) != update(twin, healthy) or not same(learner, twin):
        return "the next update was another than without the fault"
    return None


def make_learner(config: GRPOConfig, policy: Path, *, in_bf16: bool = False) -> Learner:
    """A learner on the CPU; with `in_bf16` the model computes in bf16 beside fp32 masters, as on a GPU."""
    learner = Learner(config, _load(policy))
    if in_bf16:
        learner.masters = MasterWeights(learner.model, compute_dtype=torch.bfloat16)
        learner.optimizer = torch.optim.AdamW(
            learner.masters.parameters,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=0.0,
        )
    return learner


def make_samples(rng: random.Random) -> list[TrainingSample]:
    """Random sequences: their numbers matter, not what they say."""
    samples = []
    for _ in range(rng.randint(2, 6)):
        prompt, length = rng.randint(1, 10), rng.randint(1, 12)
        samples.append(
            TrainingSample(
                token_ids=[rng.randrange(5, 200) for _ in range(prompt + length)],
                loss_mask=[False] * prompt + [True] * length,
                rollout_logprobs=[0.0] * prompt + [-rng.random() * 5 for _ in range(length)],
                advantage=rng.choice((-1.0, 0.5, 1.5)),
            )
        )
    return samples


def update(learner: Learner, samples: Sequence[TrainingSample]) -> dict[str, float]:
    """One update of two pieces."""
    learner.accumulate(samples[:1])
    learner.accumulate(samples[1:])
    return learner.step(learning_rate=1e-3)


def same(one: Learner, other: Learner) -> bool:
    """Whether two learners are equal to the bit: masters, what the model computes with, the optimizer's state."""
    pairs = [
        *zip(one.masters.parameters, other.masters.parameters, strict=True),
        *zip(one.model.parameters(), other.model.parameters(), strict=True),
    ]
    if not all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in pairs):
        return False
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    if ours["param_groups"] != theirs["param_groups"] or ours["state"].keys() != theirs["state"].keys():
        return False
    return all(
        torch.equal(tensor, theirs["state"][index][name])
        for index, state in ours["state"].items()
        for name, tensor in state.items()
    )


# -- in whole runs -------------------------------------------------------------------------------------------------------


class _EverySecond:
    """Every second answer is right, so that all groups have something to teach; `broken` replaces a reward."""

    def __init__(self) -> None:
        self._count = 0
        self.broken: float | None = None

    def messages(self, sample: int, /) -> list[ChatMessage]:
        return [{"role": "user", "content": f"Q{sample}"}]

    def target(self, sample: int, /) -> str:
        return "1"

    async def score(self, sample: int, text: str, /) -> Score:
        self._count += 1
        reward = float(self._count % 2)
        if self.broken is not None:
            reward, self.broken = self.broken, None
        return Score(reward=reward, correct=reward == 1.0, parse=ParseResult(answer="1"))


class _Engine:
    """The in-process engine, whose log-probs may hold a value that is none."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self.broken: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """The engine's completions, one of them with a broken log-prob."""
        completions = await self._engine.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
        if self.broken is not None and completions[0].logprobs is not None:
            logprobs = [self.broken, *completions[0].logprobs[1:]]
            completions[0] = dataclasses.replace(completions[0], logprobs=logprobs)
            self.broken = None
        return completions


class _Watcher:
    """A metric logger that also keeps a digest of the weights after each update."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.digests: dict[int, str] = {}
        self.learner: Learner | None = None

    def log(self, step: int, metrics: Mapping[str, float], /) -> None:
        assert self.learner is not None
        self.rows.setdefault(step, {}).update(metrics)
        self.digests[step] = digest(self.learner)

    def event(self, step: int, message: str, /) -> None: ...

    def close(self) -> None: ...


def digest(learner: Learner) -> str:
    """Of the masters and of AdamW's state."""
    state = hashlib.sha256()
    moments = [tensor for values in learner.optimizer.state.values() for tensor in values.values()]
    for tensor in (*learner.masters.parameters, *moments):
        state.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


class Run:
    """A run of the trainer with faults at chosen updates.

    Args:
        plan: what happens in which update (from 1): where, and the value. Beside `PLACES` there are "sampler" (a log-prob
            of the engine's), "reward", "weight" (one of the policy's own, before the update) and "moment" (of AdamW).
    """

    def __init__(
        self, rng: random.Random, policy: Path, folder: Path, plan: Mapping[int, tuple[str, float]], **settings: Any
    ) -> None:
        self.plan, self._rng = plan, rng
        self.environment, self.logger = _EverySecond(), _Watcher()
        self.engine = _Engine(LocalEngine.from_pretrained(policy))
        self.paths = RunPaths(out_dir=folder, name="gsm8k")
        folder.mkdir(parents=True, exist_ok=True)
        self.trainer: GRPOTrainer[int] = GRPOTrainer(
            config=dataclasses.replace(CONFIG, logprob_share=1.0, **settings),
            model=_load(policy),
            model_name="tiny",
            tokenizer=load_tokenizer(policy),
            engine=self.engine,
            environment=self.environment,
            train_samples=range(5),
            eval_samples=[],
            metric_logger=self.logger,
            paths=self.paths,
        )
        self.learner = self.logger.learner = self.trainer.learner
        self.logger.digests[0] = digest(self.learner)

    def go(self) -> Exception | None:
        """Run; what ended it before its time."""
        collect = self.trainer._collect

        async def collect_with_fault() -> UpdateBatch:
            faults.close()  # of the update before
            place, value = self.plan.get(self.trainer.state.step + 1, ("", 0.0))
            if place in PLACES:
                faults.enter_context(fault(self.learner, place, value, self._rng))
            elif place == "sampler":
                self.engine.broken = value
            elif place == "reward":
                self.environment.broken = value
            elif place:
                self._poison(place, value)
            return await collect()

        async def train() -> None:
            try:
                await self.trainer.run()
            finally:
                await self.engine.aclose()

        with contextlib.ExitStack() as faults, _replaced(self.trainer, "_collect", collect_with_fault):
            try:
                asyncio.run(train())
            except (ArithmeticError, ValueError) as error:
                return error
        return None

    @torch.no_grad()
    def _poison(self, place: str, value: float) -> None:
        master = self._rng.choice(self.learner.masters.parameters)
        tensor = master if place == "weight" else self.learner.optimizer.state[master]["exp_avg"]
        tensor.view(-1)[self._rng.randrange(tensor.numel())] = value

    def saved(self) -> dict[int, bool]:
        """The checkpoints by their updates, and whether all their weights are finite."""
        return {
            int(path.name.removeprefix("step_")): all(bool(p.isfinite().all()) for p in _load(path).parameters())
            for path in list_checkpoints(self.paths.checkpoints)
        }


def _runs(rng: random.Random, folder: Path, policy: Path, count: int) -> list[Injection]:
    scenario = rng.choice((_skips, _skips, _three_in_a_row, _reward, _poison))
    started = time.perf_counter()
    outcomes = scenario(rng, folder, policy)
    seconds = (time.perf_counter() - started) / len(outcomes)
    return [dataclasses.replace(outcome, seconds=seconds) for outcome in outcomes[:count]]


def _skips(rng: random.Random, folder: Path, policy: Path) -> list[Injection]:
    """Up to two updates in a row that are not finite, and the sampler's log-probs: the run goes on to its end."""
    names = sorted(BAD)
    plan = {step: (rng.choice((*PLACES, "sampler")), rng.choice(names)) for step in range(1, 7) if step not in (3, 6)}
    run = Run(rng, policy, folder, {step: (place, BAD[name]) for step, (place, name) in plan.items()})
    error = run.go()
    outcomes = []
    for step, (place, name) in plan.items():
        problem = f"the run ended: {error}" if error is not None else _skip_problem(run, step, place)
        kept = "counted, trained as without log-probs" if place == "sampler" else "update skipped and counted"
        outcomes.append(
            Injection(row=ROW, fault=f"{name} in the {place}, in a run", outcome=problem or kept, ok=problem is None)
        )
    return outcomes


def _skip_problem(run: Run, step: int, place: str) -> str | None:
    row, digests = run.logger.rows[step], run.logger.digests
    if not all(map(math.isfinite, row.values())):
        return "a figure that is not finite was logged"
    skipped = sum(place in PLACES for place, _ in run.plan.values())
    if run.trainer.state.skipped_updates != skipped:
        return f"{run.trainer.state.skipped_updates} of {skipped} skips counted"
    if place == "sampler":
        if row.get("nonfinite_logprobs") != 1:
            return "not counted"
        return None if digests[step] != digests[step - 1] else "the update was lost"
    if digests[step] != digests[step - 1]:
        return "weights or optimizer state were touched"
    return None if all(run.saved().values()) else "a checkpoint holds what is not finite"


def _three_in_a_row(rng: random.Random, folder: Path, policy: Path) -> list[Injection]:
    first, names = rng.randint(1, 4), sorted(BAD)
    plan = {step: (rng.choice(PLACES), BAD[rng.choice(names)]) for step in range(first, first + 3)}
    run = Run(rng, policy, folder, plan)
    error = run.go()
    problem = None
    if not isinstance(error, FloatingPointError):
        problem = f"the run ended with {error!r:.120}"
    elif "not finite" not in str(error) or "learning rate" not in str(error):
        problem = "the diagnosis says nothing"
    elif run.trainer.state.step != first + 2:
        problem = f"stopped after update {run.trainer.state.step}, not {first + 2}"
    elif run.logger.digests[first + 2] != run.logger.digests[first - 1]:
        problem = "weights or optimizer state were touched"
    elif not all(run.saved().values()):
        problem = "a checkpoint holds what is not finite"
    return [_ended(problem, "three updates in a row, in a run", "stopped with a diagnosis")]


def _reward(rng: random.Random, folder: Path, policy: Path) -> list[Injection]:
    step, (name, value) = rng.randint(2, 6), rng.choice(sorted(BAD.items()))
    run = Run(rng, policy, folder, {step: ("reward", value)})
    error = run.go()
    problem = None
    if not isinstance(error, ValueError) or "reward must be finite" not in str(error):
        problem = f"the run ended with {error!r:.120}"
    elif run.saved() != {saved: True for saved in range(1, step)}:
        problem = f"checkpoints {run.saved()} instead of 1 to {step - 1}"
    return [
        _ended(problem, f"{name} as a reward, in a run", "refused before it was trained on; the last update is saved")
    ]


def _poison(rng: random.Random, folder: Path, policy: Path) -> list[Injection]:
    """What no update of ours can do: the memory itself holds a NaN."""
    step, place = rng.randint(2, 6), rng.choice(("weight", "moment"))
    run = Run(rng, policy, folder, {step: (place, math.nan)})
    error = run.go()
    problem = None
    if not isinstance(error, FloatingPointError) or "earlier checkpoint" not in str(error):
        problem = f"the run ended with {error!r:.120}"
    elif run.saved() != {saved: True for saved in range(1, step)}:
        problem = f"checkpoints {run.saved()} instead of 1 to {step - 1}"
    return [_ended(problem, f"NaN in a {place} of the memory, in a run", "stopped at once, never saved")]


def _ended(problem: str | None, what: str, kept: str) -> Injection:
    return Injection(row=ROW, fault=what, outcome=problem or kept, ok=problem is None)


def _load(policy: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    return model

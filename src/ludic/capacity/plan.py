"""A plan of GPUs for a model, and what it comes to: does it fit, how long is an update, what limits it."""

from dataclasses import dataclass, replace

from ludic.capacity.memory import (
    GIB,
    NAMED_SHARE,
    Trainer,
    kv_bytes_per_gpu,
    kv_room,
    trained_parameters,
    training_parts,
)
from ludic.capacity.pace import Machine, Work, generation_seconds, sync_seconds, training_seconds
from ludic.capacity.shapes import Shape
from ludic.train.footprint import CHECKPOINT_BYTES, COMPUTE_BYTES, USABLE_SHARE

TENSOR_PARALLEL = (1, 2, 4, 8)
"""Sizes that are tried; a server of more than one host's GPUs is left out."""
BUDGETS = (65536, 32768, 16384, 8192, 4096, 2048)
"""Micro-batches that are tried, in tokens; the first is the most that `--micro-token-budget auto` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked."""

    shape: Shape
    trainer: Trainer
    machine: Machine
    work: Work
    servers: int = 1
    tensor_parallel: int = 0
    """0: the smallest that holds the rollouts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What it comes to. Bytes and seconds."""

    plan: Plan
    parts: dict[str, float]
    usable: float
    """Bytes that a training GPU may need."""
    tensor_parallel: int
    """Of each server; 0 where its weights fit no number of GPUs that was tried."""
    in_flight: int
    """Completions that a server decodes at a time."""
    generation_s: float
    training_s: float
    sync_s: float
    checkpoint_bytes: int

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def trainer_fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def server_fits(self) -> bool:
        return self.tensor_parallel > 0

    @property
    def update_s(self) -> float:
        """Strictly on-policy, with nothing of the training hidden behind generation."""
        return self.generation_s + self.training_s + self.sync_s

    @property
    def stale_update_s(self) -> float:
        """With --max-staleness 1: generation and training at the same time."""
        return max(self.generation_s, self.training_s) + self.sync_s

    @property
    def gpus(self) -> int:
        return self.plan.trainer.gpus + self.plan.servers * self.tensor_parallel

    @property
    def limit(self) -> str:
        """What limits the plan: memory where it does not fit, else the longest part of an update."""
        if not self.trainer_fits:
            return "memory of the trainer"
        if not self.server_fits:
            return "memory of the server"
        parts = {"decode": self.generation_s, "training": self.training_s, "sync": self.sync_s}
        return max(parts, key=lambda name: parts[name])


def estimate(plan: Plan) -> Estimate:
    """Memory and seconds of a plan.

    Raises:
        ValueError: the tensor parallel size does not divide the model's heads.
    """
    size, in_flight = server_layout(plan)
    shape, work, machine = plan.shape, plan.work, plan.machine
    generation = 0.0
    if size:
        generation = generation_seconds(
            shape, machine, work, servers=plan.servers, tensor_parallel=size, in_flight=in_flight
        )
    return Estimate(
        plan=plan,
        parts=training_parts(shape, plan.trainer),
        usable=usable_bytes(machine.gpu_memory),
        tensor_parallel=size,
        in_flight=in_flight,
        generation_s=generation,
        training_s=training_seconds(shape, machine, work, plan.trainer),
        sync_s=sync_seconds(shape, machine, plan.trainer),
        checkpoint_bytes=COMPUTE_BYTES * shape.parameters + CHECKPOINT_BYTES * trained_parameters(shape, plan.trainer),
    )


def usable_bytes(gpu_memory: float) -> float:
    """What training may need of a GPU, by the number in its name."""
    return gpu_memory * NAMED_SHARE * GIB * USABLE_SHARE


def server_layout(plan: Plan) -> tuple[int, int]:
    """(tensor parallel size, completions in flight on a server): the smallest size that holds all of a server's rollouts at
    their longest, or else the largest with as many as it holds; (0, 0) where not even one fits."""
    heads, asked = plan.shape.heads, plan.tensor_parallel
    if asked and heads % asked:
        raise ValueError(
            f"--tensor-parallel {asked} does not divide the {heads} heads of {plan.shape.name}: take a divisor"
        )
    wanted = -(-plan.work.rollouts // plan.servers)
    found = (0, 0)
    for size in (asked,) if asked else TENSOR_PARALLEL:
        if heads % size:
            continue
        sequence = (plan.work.prompt + plan.work.longest) * kv_bytes_per_gpu(plan.shape, size)
        holds = int(kv_room(plan.shape, size, plan.machine.gpu_memory) // sequence)
        if holds >= wanted:
            return size, wanted
        if holds >= 1:
            found = (size, holds)
    return found


def largest_budget(shape: Shape, trainer: Trainer, gpu_memory: float, *, least: int = 0) -> int:
    """The largest of `BUDGETS` from `least` on that fits the GPU; 0 if none does."""
    for budget in BUDGETS:
        need = sum(training_parts(shape, replace(trainer, row=budget)).values())
        if budget >= least and need <= usable_bytes(gpu_memory):
            return budget
    return 0


def best_layout(plan: Plan, *, gpus: int) -> Estimate | None:
    """With `plan.trainer.gpus` of them for training and the rest for servers of one size: the quickest update, with the largest
    micro-batches that fit, or the smallest where none do; None where no server fits."""
    work = plan.work
    budget = largest_budget(plan.shape, plan.trainer, plan.machine.gpu_memory, least=work.longest_sequence)
    trainer = replace(plan.trainer, row=budget or max(BUDGETS[-1], work.longest_sequence))
    found = []
    for size in TENSOR_PARALLEL:
        servers = (gpus - trainer.gpus) // size
        if servers and plan.shape.heads % size == 0:
            made = estimate(replace(plan, trainer=trainer, servers=servers, tensor_parallel=size))
            found += [made] if made.server_fits else []
    return min(found, key=lambda made: made.update_s, default=None)

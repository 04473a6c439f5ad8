"""What is printed: Markdown, which reads as it is and stands as it is in docs/capacity.md."""

from collections.abc import Sequence
from dataclasses import replace

from ludic.capacity.measured import TOLERANCE, Check, checks
from ludic.capacity.memory import ACTIVATIONS, GIB, WORK, Trainer, host_bytes, pass_parts, sync_parts, training_parts
from ludic.capacity.pace import sync_bytes
from ludic.capacity.plan import Estimate, Plan, best_layout, largest_budget, usable_bytes
from ludic.capacity.shapes import read_shape
from ludic.telemetry.formatting import count, seconds

GPU_SIZES = (80.0, 141.0)
"""Of H100 and H200, by name."""
LORA_MODELS = ("0.5B", "1.5B", "7B", "32B")


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; its first column stands left, the others right.

    Example:
        >>> print(table(["part", "GiB"], [["masters", "1.8"]]))
        | part    | GiB |
        |---------|----:|
        | masters | 1.8 |
    """
    cells = [list(headers), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    lines = []
    for first, *others in cells:
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *aligned]) + " |")
    rule = "|" + "|".join("-" * (width + 1) + (":" if place else "-") for place, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def plan_text(found: Estimate) -> str:
    """One plan: parameters, memory by part, seconds of an update, the verdict."""
    plan, trainer = found.plan, found.plan.trainer
    shape, memory = plan.shape, plan.machine.gpu_memory
    size = found.tensor_parallel
    servers = (
        f"{plan.servers} server{'s' * (plan.servers > 1)} of {size} GPU{'s' * (size > 1)}" if size else "no server fits"
    )
    trained = f"LoRA of rank {trainer.lora_rank}" if trainer.lora_rank else "all parameters are trained"
    head = (
        f"{shape.name}: {count(shape.parameters)} parameters, {trained}. {trainer.gpus} training "
        f"GPU{'s' * (trainer.gpus > 1)} of {memory:g} GB, {servers}."
    )
    parts = [[name, gib(size)] for name, size in found.parts.items() if size]
    of = "training GPU 0, the fullest" if trainer.gpus > 1 else "the training GPU"
    parts.append([f"**peak of {of}**", f"**{gib(found.peak)}**"])
    parts.append(["what it may need", gib(found.usable)])
    tables = [table(["memory", "GiB"], parts), table(["", ""], _seconds(found))]
    return "\n\n".join([head, *tables, *_hosts(plan), _verdict(found)])


def _hosts(plan: Plan) -> list[str]:
    """What several training GPUs need of their hosts' memory."""
    if plan.trainer.gpus == 1:
        return []
    loaded, kept, gathered = host_bytes(plan.shape, plan.trainer)
    then = f" and {gib(kept)} GiB afterwards" if kept else ""
    return [
        f"Memory of the hosts: {gib(loaded)} GiB for each training GPU while it starts{then}; {gib(gathered)} GiB on the first "
        "host during a checkpoint."
    ]


def _seconds(found: Estimate) -> list[list[str]]:
    plan = found.plan
    disk, sent = plan.machine.disk, sync_bytes(plan.shape)
    rows = [[f"generation, {count(found.in_flight)} in flight on each server", seconds(found.generation_s)]]
    rows = rows if found.server_fits else [["generation", "-"]]
    rows += [
        [f"training, {count(plan.work.forwarded)} tokens", seconds(found.training_s)],
        [f"weight sync, {gib(sent)} GiB", seconds(found.sync_s)],
    ]
    if found.server_fits:
        rows.append(["**an update, on-policy**", f"**{seconds(found.update_s)}**"])
        rows.append(["an update with `--max-staleness 1`", seconds(found.stale_update_s)])
    rows.append([f"a checkpoint, {gib(found.checkpoint_bytes)} GiB, to disk", seconds(found.checkpoint_bytes / disk)])
    return rows


def _verdict(found: Estimate) -> str:
    plan = found.plan
    budget = largest_budget(plan.shape, plan.trainer, plan.machine.gpu_memory, least=plan.work.longest_sequence)
    fits = f"Micro-batches of {budget:,} tokens fit." if budget else "No micro-batch that holds a sequence fits."
    advice = ""
    if not found.trainer_fits and not budget:
        advice = f" {_way_out(plan)}"
    if not found.server_fits:
        advice += " Take a larger --tensor-parallel for the server."
    return f"Limit: {found.limit}. {fits}{advice}"


def _way_out(plan: Plan) -> str:
    """The first flags with which a micro-batch fits, of those that make a training smaller."""
    trainer = replace(plan.trainer, checkpointing=True, lora_rank=0)
    for flags, other in (
        ("--gradient-checkpointing", replace(plan.trainer, checkpointing=True)),
        ("--gradient-checkpointing --training-gpus 8", replace(trainer, gpus=8, cpu_offload=False)),
        ("--gradient-checkpointing --training-gpus 8 --cpu-offload", replace(trainer, gpus=8, cpu_offload=True)),
        ("--gradient-checkpointing --training-gpus 1 --lora-rank 16", Trainer(checkpointing=True, lora_rank=16)),
    ):
        if largest_budget(plan.shape, other, plan.machine.gpu_memory, least=plan.work.longest_sequence):
            return f"Take {flags}."
    return "Neither --gradient-checkpointing, 8 --training-gpus, --cpu-offload nor --lora-rank 16 makes it fit."


def layouts_text(plan: Plan, *, gpus: int) -> str:
    """So many GPUs shared out between training and generation, for each size of GPU."""
    rows = []
    for memory in GPU_SIZES:
        machine = replace(plan.machine, gpu_memory=memory, memory_rate=memory_rate(memory))
        for share in (8, 16, 24, 28):
            training = gpus * share // 32
            if not training:
                continue
            trainer = replace(plan.trainer, gpus=training, cpu_offload=plan.trainer.cpu_offload and training > 1)
            rows.append(
                _layout_row(best_layout(replace(plan, machine=machine, trainer=trainer), gpus=gpus), memory, training)
            )
    headers = ["GPU", "training GPUs", "servers x GPUs", "budget", "peak GiB", "may need", "in flight", "generation", "training",
               "sync", "update", "staleness 1", "limit"]  # fmt: skip
    return f"{plan.shape.name}: {count(plan.shape.parameters)} parameters on {gpus} GPUs.\n\n" + table(headers, rows)


def _layout_row(found: Estimate | None, memory: float, training: int) -> list[str]:
    if found is None:
        return [f"{memory:g} GB", str(training), *["-"] * 10, "memory of the server"]
    plan = found.plan
    servers = f"{plan.servers} x {found.tensor_parallel}"
    beginning = [f"{memory:g} GB", str(training), servers, f"{plan.trainer.row:,}", gib(found.peak), gib(found.usable)]
    if not found.trainer_fits:
        return [*beginning, *["-"] * 6, found.limit]
    times = (found.generation_s, found.training_s, found.sync_s, found.update_s, found.stale_update_s)
    return [*beginning, count(found.in_flight), *map(seconds, times), found.limit]


def lora_text(rank: int, row: int) -> str:
    """One training GPU: LoRA beside full training, with and without gradient checkpointing."""
    rows = []
    for name in LORA_MODELS:
        shape = read_shape(name)
        for checkpointing in (False, True):
            trainer = Trainer(row=row, lora_rank=rank, checkpointing=checkpointing)
            parts = pass_parts(shape, trainer)
            passes, sync = sum(parts.values()), sum(sync_parts(shape, trainer).values())
            base, kept, work = parts["frozen base, bf16"], parts[ACTIVATIONS], parts[WORK]
            full = sum(training_parts(shape, replace(trainer, lora_rank=0)).values())
            budgets = [largest_budget(shape, trainer, memory) for memory in GPU_SIZES]
            rows.append([
                name + (", checkpointed" if checkpointing else ""), count(shape.adapter_parameters(rank)), gib(base),
                gib(passes - base - kept - work), gib(kept), gib(work), gib(passes), gib(sync),
                *(f"{budget:,}" if budget else "none" for budget in budgets), gib(full),
            ])  # fmt: skip
    limits = " and ".join(f"{gib(usable_bytes(memory))} GiB of {memory:g} GB" for memory in GPU_SIZES)
    head = f"LoRA of rank {rank}, one training GPU, micro-batches of {row:,} tokens, GiB. Training may need {limits}."
    headers = ["model", "adapter parameters", "base, bf16", "adapter, 18 bytes each", "activations", "logits chunk, or a layer",
               "peak of the passes", "a sync", "largest budget, 80 GB", "141 GB", "full training"]  # fmt: skip
    return f"{head}\n\n{table(headers, rows)}"


def measured_text() -> str:
    """Every prediction beside its measurement; those that miss are named."""
    found = checks()
    missed = [check for check in found if check.missed]
    rows = [
        [
            check.what,
            check.unit,
            f"{check.measured:g}",
            f"{check.predicted:#.3g}",
            percent(check.error),
            _remark(check),
        ]
        for check in found
    ]
    proving = [check for check in found if not check.fitted]
    said = (
        f"{len(proving) - len(missed)} of {len(proving)} predictions lie within {TOLERANCE:.0%} of what was measured; "
        f"{len(found) - len(proving)} more figures are those that the constants come from. Missed: "
        + "; ".join(f"{check.what} ({percent(check.error)})" for check in missed)
        + "."
    )
    return f"{table(['what', 'unit', 'measured', 'predicted', 'off by', ''], rows)}\n\n{said}"


def _remark(check: Check) -> str:
    return "**missed**" if check.missed else "fitted" if check.fitted else ""


def percent(error: float) -> str:
    """A signed share of 1 in whole percent.

    Example:
        >>> percent(-0.213), percent(-0.001)
        ('-21%', '+0%')
    """
    return f"{round(100 * error):+d}%"


def memory_rate(gpu_memory: float) -> float:
    """Bytes a second of an H100 with 80 GB, or of an H200."""
    return 3.35e12 if gpu_memory <= GPU_SIZES[0] else 4.8e12


def gib(size: float) -> str:
    """Bytes as GiB, with a digit behind the point, two where it is below 1."""
    value = size / GIB
    return f"{value:.2f}" if value < 1 else f"{value:,.1f}"

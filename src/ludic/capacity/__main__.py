"""The command line of `python -m ludic.capacity`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from ludic.capacity.memory import Trainer
from ludic.capacity.pace import BETWEEN_HOSTS, GPUS_OF_A_HOST, MFU, NVLINK, Machine, Work
from ludic.capacity.plan import Plan, estimate, server_layout
from ludic.capacity.shapes import NAMED, read_shape
from ludic.capacity.tables import layouts_text, lora_text, measured_text, memory_rate, plan_text
from ludic.completion import add_completion_argument
from ludic.config import GRPOConfig
from ludic.storage.inert import inert
from ludic.versions import add_version_argument

VIEWS = ("plan", "layouts", "lora", "measured")
_CONFIG = GRPOConfig()
_LORA_RANK = 16
"""Of the view lora, where none is given."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ludic.capacity",
        description="Says by arithmetic whether a model fits, and how long an update takes. Needs no GPU and no weights.",
        epilog="plan: one plan, by the flags. layouts: --gpus shared out between training and servers. lora: four models on one "
        "GPU. measured: predictions beside what was measured.",
    )
    parser.add_argument("view", nargs="?", choices=VIEWS, default="plan", help="which table (default: plan)")
    add_completion_argument(parser)
    add_version_argument(parser)
    _add_training(parser)
    _add_generation(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpu-memory", type=float, default=141.0, help="GB in the GPU's name, as 80 or 141 (default: 141)"
    )
    machine.add_argument(
        "--gpu-bandwidth", type=float, help="TB/s of its memory (default: an H100's up to 80 GB, else an H200's)"
    )
    machine.add_argument(
        "--link", type=float, help="GB/s into each GPU from the others (default: 236 up to 8 GPUs in all, else 50)"
    )
    machine.add_argument("--disk", type=float, default=2.0, help="GB/s of checkpoints (default: 2)")
    machine.add_argument(
        "--mfu", type=float, default=MFU, help="of the trainer's kernels, of 989 TFLOP/s (default: 0.48)"
    )
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    names = ", ".join(NAMED)
    group.add_argument("--model", default="0.5B", help=f"{names}, or a folder with config.json (default: 0.5B)")
    group.add_argument("--training-gpus", type=int, default=1, help="FSDP2, full shard (default: 1)")
    group.add_argument("--gpus", type=int, default=32, help="of the view layouts, in all (default: 32)")
    group.add_argument("--lora-rank", type=int, default=0, help="0: all parameters are trained (default: 0; lora: 16)")
    for name, words in (
        ("micro_token_budget", "tokens of a micro-batch"),
        ("logprob_chunk", "tokens that meet the vocabulary at once"),
    ):
        default = _default(name)
        group.add_argument(_flag(name), type=int, default=default, help=f"{words} (default: {default})")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    group.add_argument(
        "--cpu-offload",
        action="store_true",
        help="weights and AdamW's state in the hosts' memory, of several training GPUs",
    )
    group.add_argument("--fp32-head", action="store_true", help="keep logits in fp32")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--servers", type=int, default=1, help="vLLM servers (default: 1)")
    group.add_argument(
        "--tensor-parallel", type=int, default=0, help="GPUs of each; 0: as few as hold its rollouts (default: 0)"
    )
    for name, words in (("rollouts_per_update", "of all servers"), ("group_size", "completions of each prompt")):
        default = _default(name)
        group.add_argument(_flag(name), type=int, default=default, help=f"{words} (default: {default})")
    for name, default, words in (
        ("prompt_tokens", 100, "of a prompt"),
        ("completion_tokens", 500, "of a completion, mean"),
        ("longest", 1024, "tokens of the longest completion"),
    ):
        group.add_argument(_flag(name), type=int, default=default, help=f"{words} (default: {default})")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(name: str) -> int:
    """The default of a run's setting."""
    value: int = getattr(_CONFIG, name)
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """0 where a table was printed, also of a plan that does not fit; 2, with one line, for flags that make no sense."""
    args = build_parser().parse_args(argv)
    try:
        check_arguments(args)
        if args.view == "measured":
            text = measured_text()
        elif args.view == "lora":
            text = lora_text(args.lora_rank or _LORA_RANK, args.micro_token_budget)
        elif args.view == "layouts":
            text = layouts_text(plan_of(args), gpus=args.gpus)
        else:
            text = plan_text(estimate(plan_of(args)))
    except ValueError as error:
        sys.stderr.write(f"python -m ludic.capacity: error: {inert(str(error))}\n")
        return 2
    sys.stdout.write(text + "\n")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for a value out of range, or for two that contradict each other."""
    at_least_1 = ("training_gpus", "servers", "micro_token_budget", "logprob_chunk", "rollouts_per_update", "group_size",
                  "prompt_tokens", "completion_tokens", "longest")  # fmt: skip
    for name in at_least_1:
        if getattr(args, name) < 1:
            raise ValueError(f"{_flag(name)} {getattr(args, name)}: it must be at least 1")
    for name in ("lora_rank", "tensor_parallel"):
        if getattr(args, name) < 0:
            raise ValueError(f"{_flag(name)} {getattr(args, name)}: it must be at least 0")
    for name in ("gpu_memory", "gpu_bandwidth", "link", "disk", "mfu"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{_flag(name)} {value}: it must be above 0")
    if args.mfu > 1:
        raise ValueError(f"--mfu {args.mfu}: it is a fraction, at most 1")
    if args.gpus < 2:
        raise ValueError(f"--gpus {args.gpus}: training and a server need at least 2")
    _check_ranks(args)
    if args.completion_tokens > args.longest:
        raise ValueError(
            f"--completion-tokens {args.completion_tokens} is above --longest {args.longest}: raise --longest"
        )
    longest = args.prompt_tokens + args.longest
    if args.view in ("plan", "layouts") and args.micro_token_budget < longest:
        raise ValueError(
            f"--micro-token-budget {args.micro_token_budget} does not hold a sequence of {longest} tokens: raise it, or lower "
            "--longest"
        )


def _check_ranks(args: argparse.Namespace) -> None:
    """What the trainer refuses of several GPUs, or of one."""
    if args.lora_rank and args.view == "layouts":
        raise ValueError(f"--lora-rank {args.lora_rank} is for one training GPU, and layouts has more: leave it out")
    lora = args.lora_rank or (_LORA_RANK if args.view == "lora" else 0)
    if lora and args.training_gpus > 1:
        raise ValueError(f"--lora-rank {lora} is for one training GPU: leave out --training-gpus {args.training_gpus}")
    if args.cpu_offload and (args.view == "lora" or (args.view == "plan" and args.training_gpus == 1)):
        raise ValueError("--cpu-offload is for several training GPUs: add --training-gpus, or leave it out")


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the flags describe."""
    bandwidth = memory_rate(args.gpu_memory) if args.gpu_bandwidth is None else args.gpu_bandwidth * 1e12
    plan = Plan(
        shape=read_shape(args.model),
        trainer=Trainer(
            gpus=args.training_gpus,
            row=args.micro_token_budget,
            chunk=args.logprob_chunk,
            lora_rank=args.lora_rank,
            checkpointing=args.gradient_checkpointing,
            fp32_head=args.fp32_head,
            cpu_offload=args.cpu_offload,
        ),
        machine=Machine(gpu_memory=args.gpu_memory, memory_rate=bandwidth, disk=args.disk * 1e9, mfu=args.mfu),
        work=Work(
            rollouts=args.rollouts_per_update,
            group_size=args.group_size,
            prompt=args.prompt_tokens,
            completion=args.completion_tokens,
            longest=args.longest,
        ),
        servers=args.servers,
        tensor_parallel=args.tensor_parallel,
    )
    gpus = args.gpus if args.view == "layouts" else args.training_gpus + args.servers * server_layout(plan)[0]
    link = NVLINK if gpus <= GPUS_OF_A_HOST else BETWEEN_HOSTS
    return replace(plan, machine=replace(plan.machine, link=link if args.link is None else args.link * 1e9))


if __name__ == "__main__":
    sys.exit(main())

"""TRL's experimental AsyncGRPOTrainer on ludic's benchmark task, without the Hub.

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.cli.main serve POLICY --host 127.0.0.1 \\
        --port 8001 --max-model-len 2048 --gpu-memory-utilization 0.4 --weight-transfer-config '{"backend": "nccl"}' \\
        --logprobs-mode processed_logprobs --max-logprobs -1
    CUDA_VISIBLE_DEVICES=1 PYTHONPATH=src:. python -m benchmarks.peers.trl_async --model POLICY --dataset DIR

Two things are put in from outside. TRL fetches FlashAttention 3 from the Hub for its rows, in which a shared prompt is
forwarded once; here that kernel is torch's variable-length attention, which takes the same arguments. And TRL's rollout
worker parses completions with a response template, which it knows only for published models; here it gets the plain one
of the tokenizer's own chat template.

With `--token-budget` an update is two micro-batches filled to the budget, so its number of completions is not exactly
`--rollouts`; `--token-budget 0` trains on exactly that many. Every update therefore says how many it had, and
`seconds_per_rollouts` is its time for `--rollouts` of them.

Left out: learning curves, evaluation, checkpoints. `--cpu --no-weight-sync` tries the script against a server on the CPU.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerBase, TrainerCallback

from benchmarks.parts import Pauses
from benchmarks.peers.common import JSONLines, JSONValue, conversation_reward, leave, run_to_the_end
from benchmarks.peers.trl_shared import (
    GROUP_SIZE,
    UpdateClock,
    add_common_flags,
    prepare_process,
    prompt_dataset,
    require_same_prompts,
    stop_printing,
    training_settings,
)

PEER = "trl_async"

MAX_KERNEL_ERROR = 0.05
"""Of bf16 against fp32, relative to the largest value; a wrong alignment or a leak is some tens of times as large."""

VarlenKernel = Callable[..., torch.Tensor]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, peer=PEER)
    parser.add_argument("--max-staleness", type=int, default=1, help="versions a rollout may lag behind (default: 1)")
    parser.add_argument(
        "--token-budget",
        type=int,
        default=16384,
        help="tokens of a row; 0: a fixed number of rollouts (default: 16384)",
    )
    parser.add_argument("--micro-batches", type=int, default=2, help="gradient_accumulation_steps (default: 2)")
    parser.add_argument("--max-inflight", type=int, default=-1, help="requests at once; -1: TRL's own choice (default)")
    parser.add_argument("--no-weight-sync", action="store_true", help="the server keeps its weights; to try the script")
    args = parser.parse_args(argv)
    if args.rollouts % args.micro_batches or args.rollouts % GROUP_SIZE:
        parser.error(
            f"--rollouts {args.rollouts} must be a multiple of --micro-batches {args.micro_batches} and {GROUP_SIZE}"
        )
    return args


# -- the attention kernel ----------------------------------------------------------------------------------------------


def varlen_kernel(*, expand_groups: bool) -> VarlenKernel:
    """`flash_attn_varlen_func` of FlashAttention 3, as far as TRL calls it, by `torch.nn.attention.varlen`.

    Causal, and aligned to the end of the keys: the last query of a segment sees the last key of its path. `expand_groups`
    repeats keys and values for grouped queries where the kernel cannot share them.
    """
    from torch.nn.attention.varlen import varlen_attn

    def run(
        query: torch.Tensor,  # [Tq, Hq, D]
        key: torch.Tensor,  # [Tk, Hkv, D]
        value: torch.Tensor,  # [Tk, Hkv, D]
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        if not causal:
            raise ValueError("only causal attention was put in the place of FlashAttention 3")
        if expand_groups:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        # varlen_attn takes (left, 0) for causal; FlashAttention says causal beside a window of (-1, -1).
        window = (window_size[0], 0)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return varlen_attn(query, key, value, *lengths, scale=softmax_scale, window_size=window)  # type: ignore[return-value]

    return run


def segment_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """The same, one segment after another: for the CPU, and to check the fast one by."""
    if not causal or window_size != (-1, -1):
        raise ValueError(f"only causal attention without a window is here, not causal={causal}, window {window_size}")
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairs(cu_seqlens_q), pairs(cu_seqlens_k), strict=True):
        q, k, v = query[q0:q1].transpose(0, 1), key[k0:k1].transpose(0, 1), value[k0:k1].transpose(0, 1)
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device).tril(diagonal=(k1 - k0) - (q1 - q0))
        attended = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=softmax_scale, enable_gqa=q.shape[0] != k.shape[0]
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def pairs(boundaries: torch.Tensor) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(boundaries.tolist())


def kernel_error(kernel: VarlenKernel, device: torch.device) -> float:
    """The largest difference of a kernel from `segment_kernel` in fp32, over outputs and gradients, relative to their scale.

    The case is what TRL's rows are: a prompt of 5, and two completions (of 3 and of 1) that see it; four query heads over
    two key heads.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": (9, 4, 64), "key": (9, 2, 64), "value": (9, 2, 64)}
    reference = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes.values()]
    tested = [tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in reference]
    paths = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 8], device=device)
    cu_q = torch.tensor([0, 5, 8, 9], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 5, 13, 19], dtype=torch.int32, device=device)

    def outputs(run: VarlenKernel, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        query, key, value = tensors
        out = run(query, key[paths], value[paths], cu_q, cu_k, 5, 8, softmax_scale=0.125, causal=True)
        out.float().square().sum().backward()
        return [out, *(tensor.grad for tensor in tensors if tensor.grad is not None)]

    differences = zip(outputs(kernel, tested), outputs(segment_kernel, reference), strict=True)
    return max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in differences)


def choose_kernel(device: torch.device) -> tuple[str, VarlenKernel]:
    """The fastest kernel that gives the right numbers on this device, and its name.

    Raises:
        RuntimeError: none does; the message has what each said.
    """
    if device.type == "cpu":
        return "one segment after another", segment_kernel
    said = []
    for name, expand in (("torch varlen, grouped queries", False), ("torch varlen, repeated keys", True)):
        kernel = varlen_kernel(expand_groups=expand)
        try:
            error = kernel_error(kernel, device)
        except (RuntimeError, ValueError) as problem:  # what torch raises for shapes that a kernel does not take
            said.append(f"{name}: {problem}")
            continue
        if error < MAX_KERNEL_ERROR:
            return name, kernel
        said.append(f"{name}: off by {error:.3g} of the scale")
    raise RuntimeError("no variable-length attention works here: " + "; ".join(said))


def replace_hub_kernel(kernel: VarlenKernel) -> None:
    """Give TRL's tree attention this kernel instead of the one that it would fetch from the Hub."""
    from trl.experimental.async_grpo import packing

    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=kernel)


# -- the tokenizer's response template -------------------------------------------------------------------------------------


def add_response_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer.parse_response` read a plain answer: all text up to the end-of-turn token is the content.

    TRL's worker knows the templates of published models and refuses others. Where the answer begins is what the chat
    template adds for `add_generation_prompt`.
    """
    probe = [{"role": "user", "content": "1 + 1"}]
    without = str(tokenizer.apply_chat_template(probe, tokenize=False))
    opened = str(tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True))
    anchor = opened.removeprefix(without)
    if not anchor or anchor == opened:
        raise ValueError(f"the chat template adds no plain generation prompt: {opened!r} after {without!r}")
    # TRL asks for this attribute first and leaves it alone where it is set.
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": anchor,
        "fields": {"content": {"close": tokenizer.eos_token, "content": "text"}},
    }


# -- the trainer -----------------------------------------------------------------------------------------------------------


class Finish(TrainerCallback):
    """Calls `finish` with the trainer's arguments as soon as the last update is done.

    TRL would wait 15 s more for the requests of its rollout worker that are in flight.
    """

    def __init__(self, finish: Callable[[Any], None]) -> None:
        self._finish = finish

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish(args)


class NoWeightSync:
    """TRL's `WeightTransferProtocol`, doing nothing: NCCL needs GPUs."""

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


def make_config(args: argparse.Namespace) -> Any:
    from trl.experimental.async_grpo import AsyncGRPOConfig

    return AsyncGRPOConfig(
        **training_settings(args),
        per_device_train_batch_size=args.rollouts // args.micro_batches,
        gradient_accumulation_steps=args.micro_batches,
        num_generations=GROUP_SIZE,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        top_p=1.0,
        dtype=args.dtype,
        token_budget=args.token_budget,
        max_staleness=args.max_staleness,
        max_inflight_tasks=args.max_inflight,
        vllm_server_base_url=args.server,
        vllm_server_timeout=60.0,
        # These run on while this trainer pauses for others.
        request_timeout=int(args.max_seconds),
        weight_sync_timeout=60,
        heartbeat_stale_after_s=args.max_seconds,
    )


def make_trainer(
    args: argparse.Namespace, lines: JSONLines, kernel: VarlenKernel, finish: Callable[[Any], None]
) -> Any:
    from transformers import AutoTokenizer
    from trl.experimental.async_grpo import AsyncGRPOTrainer, async_grpo_trainer

    replace_hub_kernel(kernel)
    if args.cpu:
        async_grpo_trainer.get_peak_flops_per_device = lambda *_: None  # it asks for the GPU's name
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    dataset = prompt_dataset(args)
    # As TRL's worker does it, which lives in another process.
    tokenize: dict[str, Any] = {
        "return_dict": False,
        "add_generation_prompt": True,
        "tools": None,
        "chat_template": None,
    }
    require_same_prompts(
        tokenizer, dataset, lambda prompts: [tokenizer.apply_chat_template(prompt, **tokenize) for prompt in prompts]
    )
    add_response_template(tokenizer)

    def parts(seconds: float, metrics: Mapping[str, float]) -> Mapping[str, JSONValue]:
        return update_parts(seconds, metrics, rollouts=args.rollouts)

    trainer = AsyncGRPOTrainer(
        model=args.model,
        reward_funcs=conversation_reward,
        args=make_config(args),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[UpdateClock(lines, parts, Pauses(args.pause_after)), Finish(finish)],
        weight_transfer=NoWeightSync() if args.no_weight_sync else None,
    )
    stop_printing(trainer)
    return trainer


def update_parts(seconds: float, metrics: Mapping[str, float], *, rollouts: int) -> dict[str, JSONValue]:
    """An update in TRL's own metrics. Generation runs beside training, so the parts do not add up to the whole:
    `rollout_wait_s` is how long the trainer sat idle for want of rollouts."""
    completions = round(float(metrics["batch/samples_per_step"]))
    tokens = round(float(metrics["batch/trained_tokens_per_step"]))
    return {
        "seconds_per_rollouts": seconds * rollouts / completions,
        "rollout_wait_s": metrics.get("perf/rollout_wait_s"),
        "train_s": metrics.get("perf/fwd_bwd_s"),
        "optimizer_s": metrics.get("perf/optimizer_s"),
        "sync_s": metrics.get("perf/weight_sync_s"),
        "completions": completions,
        "completion_tokens": tokens,
        "mean_completion_length": tokens / completions,
        "truncated_share": metrics.get("completions/clipped_ratio"),
        "forwarded_tokens": metrics.get("batch/forwarded_tokens_per_step"),
        "micro_batches": metrics.get("batch/microbatches_per_step"),
        "reward_mean": metrics.get("reward"),
        "staleness_mean": metrics.get("sample/staleness_mean"),
        "dropped_stale": metrics.get("sample/dropped_stale_total", 0.0),
        "ratio_mean": metrics.get("ratio"),
        "kl": metrics.get("kl"),
    }


def settings(args: argparse.Namespace, config: Any, kernel_name: str) -> dict[str, JSONValue]:
    return {
        "trainer": "AsyncGRPOTrainer",
        "rollouts": args.rollouts,
        "group_size": GROUP_SIZE,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "token_budget": config.token_budget,
        "max_staleness": config.max_staleness,
        "max_inflight_tasks": config.max_inflight_tasks,
        "dtype": args.dtype,
        "bf16": config.bf16,
        "attention": kernel_name,
        "optim": config.optim.value,
        "weight_sync": not args.no_weight_sync,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    prepare_process()
    lines = JSONLines(PEER, args.out)

    def train() -> None:
        kernel_name, kernel = choose_kernel(torch.device("cpu" if args.cpu else "cuda"))

        def finish(config: Any) -> None:
            lines.summary(settings(args, config, kernel_name))
            leave(0)

        make_trainer(args, lines, kernel, finish).train()
        raise RuntimeError("TRL's trainer came back without the end of training")

    run_to_the_end(train, lines, max_seconds=args.max_seconds, server=args.server)


if __name__ == "__main__":
    main()

"""TRL's GRPOTrainer in vLLM server mode on ludic's benchmark task: GSM8K's prompts, a checksum as the reward.

    CUDA_VISIBLE_DEVICES=0 VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.cli.main serve POLICY --host 127.0.0.1 \\
        --port 8001 --max-model-len 2048 --gpu-memory-utilization 0.4 --weight-transfer-config '{"backend": "nccl"}' \\
        --logprobs-mode processed_logprobs --max-logprobs -1
    CUDA_VISIBLE_DEVICES=1 PYTHONPATH=src:. python -m benchmarks.peers.trl_grpo --model POLICY --dataset DIR

The server is vLLM's own; `trl vllm-serve` of TRL 1.16 is deprecated and only runs that command. Settings are the fastest
that were found in TRL 1.16: one optimizer step a generation batch, no gradient checkpointing, fused AdamW, TRL's own
fused head (always on: log-probs in tiles, no full logits). TRL 1.16 has no packing or padding-free rows for GRPO and no
Liger GRPO loss any more; `--liger` is what is left of it, Liger's kernels for the layers.

`--no-correction` drops the importance-sampling correction, and with it one forward pass over all rollouts. TRL asks the
server for log-probs all the same: in server mode `logprobs=0` is fixed, and the answer is read without a check.

Left out: learning curves, evaluation, checkpoints. `--no-vllm --cpu` generates with transformers on the CPU, to try the
script where there is no GPU.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.parts import Pauses
from benchmarks.peers.common import JSONLines, JSONValue, conversation_reward, run_to_the_end
from benchmarks.peers.trl_shared import (
    GROUP_SIZE,
    Stopwatch,
    UpdateClock,
    add_common_flags,
    prepare_process,
    prompt_dataset,
    require_same_prompts,
    stop_printing,
    training_settings,
)

PEER = "trl_grpo"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_flags(parser, peer=PEER)
    parser.add_argument("--batch-size", type=int, default=64, help="per_device_train_batch_size (default: 64)")
    parser.add_argument("--liger", action="store_true", help="use_liger_kernel: Liger's kernels for the layers")
    parser.add_argument("--no-correction", action="store_true", help="vllm_importance_sampling_correction=False")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation (default: sdpa)")
    parser.add_argument("--torch-compile", action="store_true", help="torch_compile=True; recompiles as lengths change")
    parser.add_argument("--pad-to-multiple-of", type=int, help="pads prompts and completions; helps --torch-compile")
    parser.add_argument("--group-port", type=int, default=51216, help="of the NCCL rendezvous (default: 51216)")
    parser.add_argument("--no-vllm", action="store_true", help="generate with transformers; to try the script")
    args = parser.parse_args(argv)
    if args.rollouts % args.batch_size or args.rollouts % GROUP_SIZE:
        parser.error(
            f"--rollouts {args.rollouts} must be a multiple of --batch-size {args.batch_size} and of {GROUP_SIZE}"
        )
    return args


def make_config(args: argparse.Namespace) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        **training_settings(args),
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.rollouts // args.batch_size,  # one optimizer step a generation batch
        num_generations=GROUP_SIZE,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        top_p=1.0,
        beta=0.0,
        num_iterations=1,
        shuffle_dataset=False,  # every peer takes the prompts in the order of the file
        pad_to_multiple_of=args.pad_to_multiple_of,
        use_liger_kernel=args.liger,
        torch_compile=args.torch_compile,
        use_vllm=not args.no_vllm,
        vllm_mode="server",
        vllm_server_base_url=args.server,
        vllm_server_timeout=60.0,
        vllm_group_port=args.group_port,
        vllm_importance_sampling_correction=not args.no_correction,
        # device_map None: one device, so nothing for accelerate's dispatch hooks to do.
        model_init_kwargs={"dtype": args.dtype, "attn_implementation": args.attention, "device_map": None},
    )


def make_trainer(args: argparse.Namespace, lines: JSONLines) -> Any:
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    watch = Stopwatch()

    def parts(seconds: float, metrics: Mapping[str, float]) -> Mapping[str, JSONValue]:
        return update_parts(seconds, watch.take(), metrics, rollouts=args.rollouts)

    dataset = prompt_dataset(args)
    trainer = GRPOTrainer(
        model=args.model,
        reward_funcs=conversation_reward,
        args=make_config(args),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[UpdateClock(lines, parts, Pauses(args.pause_after))],
    )
    stop_printing(trainer)
    require_same_prompts(tokenizer, dataset, lambda messages: trainer._tokenize_prompts(messages)[0])
    if not args.no_vllm:
        watch.time(trainer.vllm_generation, "generate", "generation_s")
        watch.time(trainer.vllm_generation, "sync_weights", "sync_s")
    watch.time(trainer, "_calculate_rewards", "reward_s")
    watch.time(trainer, "_generate_and_score_completions", "rollout_s")
    return trainer


def update_parts(
    seconds: float, spent: Mapping[str, float], metrics: Mapping[str, float], *, rollouts: int
) -> dict[str, JSONValue]:
    """Where an update's seconds went, of what TRL's methods took (wall clock, the GPU not waited for in between).

    `rollout_s` is all that happens before the first training pass: sync, generation, reward, and (`prepare_s`) padding,
    the pass for the old log-probs and metrics. Training is the rest of the update.
    """
    rollout = spent.get("rollout_s", 0.0)
    named = {name: spent.get(name, 0.0) for name in ("generation_s", "sync_s", "reward_s")}
    mean_length = float(metrics["completions/mean_length"])
    return {
        **named,
        "prepare_s": rollout - sum(named.values()),
        "train_s": seconds - rollout,
        "completions": rollouts,
        "completion_tokens": round(mean_length * rollouts),
        "mean_completion_length": mean_length,
        "truncated_share": float(metrics["completions/clipped_ratio"]),
        "reward_mean": float(metrics["reward"]),
        "groups_without_variance": float(metrics["frac_reward_zero_std"]),
        # Absent with --no-correction or --no-vllm.
        "logprob_gap_mean": metrics.get("sampling/sampling_logp_difference/mean"),
    }


def settings(args: argparse.Namespace, config: Any) -> dict[str, JSONValue]:
    return {
        "trainer": "GRPOTrainer",
        "rollouts": args.rollouts,
        "group_size": GROUP_SIZE,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "steps_per_generation": config.steps_per_generation,
        "dtype": args.dtype,
        "bf16": config.bf16,
        "liger": args.liger,
        "correction": not args.no_correction,
        "attention": args.attention,
        "torch_compile": args.torch_compile,
        "loss_type": config.loss_type,
        "optim": config.optim.value,
        "generation": "transformers" if args.no_vllm else "vLLM server",
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    prepare_process()
    lines = JSONLines(PEER, args.out)

    def train() -> None:
        trainer = make_trainer(args, lines)
        trainer.train()
        if not args.no_vllm:
            trainer.vllm_generation.vllm_client.close_communicator()
        lines.summary(settings(args, trainer.args))

    run_to_the_end(train, lines, max_seconds=args.max_seconds, server=None if args.no_vllm else args.server)


if __name__ == "__main__":
    main()

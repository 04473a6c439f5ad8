"""A plain padded trainer: forward, backward and step over sequences of given lengths, to compare packed rows with.

    PYTHONPATH=src:. python -m benchmarks.peers.padded_trainer --device cuda --shape 0.5b

What a straightforward trainer does, at its best: rows sorted by length, so that a micro-batch pads little; right padding,
so that causal attention needs no mask and sdpa may take its flash kernel; full logits and their cross entropy; fp32 master
weights under bf16 autocast; fused AdamW. The weights and tokens are random: neither changes the time.

Only real tokens count. Left out: compilation, a fused or chunked head, packing; those are what it is compared with.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.make_policy import SHAPES
from benchmarks.peers.common import installed_versions, machine_name

H200_BF16_FLOPS = 989e12
"""Dense bf16 peak of an H100 or H200 (SXM), in FLOP/s."""


def run(
    shape: str,
    lengths: Sequence[int],
    *,
    device: str = "cuda",
    token_budget: int = 16384,
    max_rows: int = 64,
    prompt_length: int = 0,
    gradient_checkpointing: bool = False,
    attention_mask: bool = False,
    passes: int = 3,
    warmup_passes: int = 2,
    peak_flops: float = H200_BF16_FLOPS,
) -> dict[str, float]:
    """Time `passes` updates over the same sequences, after `warmup_passes` that are not timed.

    Args:
        shape: A name in `benchmarks.make_policy.SHAPES`.
        lengths: Tokens of each sequence, prompt included; one update trains on all of them.
        device: `cuda` or `cpu`.
        token_budget: Tokens of a micro-batch at most, padding included.
        max_rows: Rows of a micro-batch at most.
        prompt_length: How many tokens at the begin of each sequence have no loss; the head runs over them all the same.
        gradient_checkpointing: Recompute each layer in the backward pass.
        attention_mask: Pass the padding mask, as most trainers do: sdpa then leaves its flash kernel.
        passes: Timed updates; the median counts.
        warmup_passes: Updates before them.
        peak_flops: What MFU is relative to, in FLOP/s.

    Returns:
        `tokens_per_s` and `seconds` of an update (median), `mfu` = 6 x parameters x real tokens / time / peak, `peak_gib`
        (0 on the CPU), `tokens`, `padded_tokens`, `micro_batches`, `parameters`.

    Raises:
        ValueError: a sequence is longer than the budget, or has nothing to train on.
    """
    if min(lengths) <= max(prompt_length, 1):
        raise ValueError(f"a sequence of {min(lengths)} tokens has none to train on after a prompt of {prompt_length}")
    place = torch.device(device)
    torch.manual_seed(0)
    model = make_model(shape, place, gradient_checkpointing=gradient_checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=place.type == "cuda")
    batches = [
        pad([torch.randint(model.config.vocab_size, (n,)) for n in rows]).to(place)
        for rows in micro_batches(lengths, token_budget=token_budget, max_rows=max_rows)
    ]
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(warmup_passes + passes):
        synchronize(place)
        started = time.perf_counter()
        update(model, optimizer, batches, prompt_length=prompt_length, attention_mask=attention_mask)
        synchronize(place)
        seconds.append(time.perf_counter() - started)
    median = sorted(seconds[warmup_passes:])[passes // 2]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = sum(lengths)
    return {
        "tokens_per_s": tokens / median,
        "seconds": median,
        "mfu": 6 * parameters * tokens / median / peak_flops,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if place.type == "cuda" else 0.0,
        "tokens": tokens,
        "padded_tokens": sum(batch.numel() for batch in batches),
        "micro_batches": len(batches),
        "parameters": parameters,
    }


def make_model(shape: str, device: torch.device, *, gradient_checkpointing: bool) -> Qwen2ForCausalLM:
    """Random fp32 weights of a shape, made on the device, in training mode."""
    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        use_cache=False,
        dtype="float32",
    )
    with device:
        model = Qwen2ForCausalLM(config)
    model.set_attn_implementation("sdpa")
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def micro_batches(lengths: Sequence[int], *, token_budget: int, max_rows: int) -> list[list[int]]:
    """Lengths from the longest to the shortest, cut into micro-batches of at most `max_rows` padded rows in the budget.

    Example:
        >>> micro_batches([3, 9, 4, 8], token_budget=18, max_rows=4)
        [[9, 8], [4, 3]]
    """
    batches: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        if length > token_budget:
            raise ValueError(f"a sequence of {length} tokens does not fit the budget of {token_budget}; raise it")
        if not batches or len(batches[-1]) == max_rows or (len(batches[-1]) + 1) * batches[-1][0] > token_budget:
            batches.append([])
        batches[-1].append(length)
    return batches


def pad(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [L] of token ids as one [B, longest], with -1 after the end of each."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)


def sum_logprobs(
    model: Qwen2ForCausalLM, batch: torch.Tensor, *, prompt_length: int = 0, attention_mask: bool = False
) -> torch.Tensor:
    """The sum of the log-probs of all tokens after the prompt, by full logits; differentiable, fp32."""
    real = batch >= 0
    tokens = batch.clamp(min=0)
    # Without a mask, real tokens still see none of the padding: it lies behind them, and attention is causal.
    logits = model(input_ids=tokens, attention_mask=real.long() if attention_mask else None, use_cache=False).logits
    # The targets are shifted, not the logits: a slice of those would be one more copy of the largest tensor there is.
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:].masked_fill(~real[:, 1:], -100)
    targets[:, : max(prompt_length - 1, 0)] = -100
    flat = logits.flatten(0, 1).float()
    return -torch.nn.functional.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")


def update(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[torch.Tensor],
    *,
    prompt_length: int,
    attention_mask: bool,
) -> None:
    """One optimizer step over all micro-batches; the loss is the mean over all tokens with loss."""
    count = sum(int((batch[:, max(prompt_length, 1) :] >= 0).sum()) for batch in batches)
    for batch in batches:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=batch.is_cuda):
            total = sum_logprobs(model, batch, prompt_length=prompt_length, attention_mask=attention_mask)
        (-total / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gsm8k_like_lengths(count: int, *, longest: int = 610, seed: int = 0) -> list[int]:
    """Prompts of about 98 tokens and completions of about 100 with a long tail: the lengths of the benchmark's policy.

    A completion has 20 tokens and an exponential rest, so that a few are several times the mean, as sampled text is.
    """
    generator = random.Random(seed)
    return [min(longest, generator.randint(60, 136) + 20 + int(generator.expovariate(1 / 80))) for _ in range(count)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="0.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sequences", type=int, default=256, help="of GSM8K-like lengths (default: 256)")
    parser.add_argument("--lengths", type=Path, help="a file with a JSON list of lengths, instead")
    parser.add_argument("--token-budget", type=int, default=16384, help="of a micro-batch, padding included")
    parser.add_argument("--max-rows", type=int, default=64, help="of a micro-batch (default: 64)")
    parser.add_argument("--prompt-length", type=int, default=0, help="tokens without loss at the begin of each")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--attention-mask", action="store_true", help="pass the padding mask, as most trainers do")
    parser.add_argument("--passes", type=int, default=3, help="timed updates (default: 3)")
    args = parser.parse_args(argv)
    if args.lengths is None:
        lengths = gsm8k_like_lengths(args.sequences)
    else:
        lengths = [int(length) for length in json.loads(args.lengths.read_text())]
    figures = run(
        args.shape,
        lengths,
        device=args.device,
        token_budget=args.token_budget,
        max_rows=args.max_rows,
        prompt_length=args.prompt_length,
        gradient_checkpointing=args.gradient_checkpointing,
        attention_mask=args.attention_mask,
        passes=args.passes,
    )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    record = {"kind": "summary", "peer": "padded_trainer", **figures, "settings": settings}
    sys.stdout.write(json.dumps({**record, "versions": installed_versions(), "machine": machine_name()}) + "\n")


if __name__ == "__main__":
    main()

"""Refuses a model that vLLM's attention on the CPU cannot compute: vLLM itself starts with it, and dies at the first request."""

import argparse

from ludic.task.pretrained import load_config


def head_size_problem(args: argparse.Namespace) -> str:
    """Why the CPU cannot serve the model of these flags, in one line; "" where it can, and on other devices.

    Args:
        args: of vLLM's own parser.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return ""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_size, supported = _head_size(args), CPUAttentionBackend.get_supported_head_sizes()
    if head_size is None or head_size in supported:
        return ""
    return (
        f"{args.model} has attention heads of size {head_size}, and vLLM's attention on the CPU knows only {supported}: it "
        "would die at the first request. Serve it on a GPU, or use --engine local"
    )


def _head_size(args: argparse.Namespace) -> int | None:
    """None for what has no such heads (state spaces), computes them in another way (MLA), or is for vLLM to refuse."""
    try:
        config = load_config(args.model, trust_remote_code=args.trust_remote_code).get_text_config()
    except ValueError:
        return None
    heads = getattr(config, "num_attention_heads", None)
    if not heads or getattr(config, "kv_lora_rank", None):
        return None
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)

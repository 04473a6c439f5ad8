"""The models of a training run, loaded as it trains them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ludic.config import GRPOConfig
from ludic.task.pretrained import load_full_config, load_model, stored_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_models(
    args: argparse.Namespace, config: GRPOConfig, checkpoint: Path | None, device: Any
) -> "tuple[PreTrainedModel, Any, PreTrainedModel | None]":
    """The policy, the dtype of its files, and the reference model where a KL penalty needs one."""
    if config.lora_rank:  # the base: the learner puts the checkpoint's adapter over it, and it is the reference too
        return *load_policy(args.model, device, args, is_frozen=True), None
    policy, dtype = load_policy(str(checkpoint or args.model), device, args, resumes=checkpoint is not None)
    return policy, dtype, load_policy(args.model, device, args)[0] if config.kl_coef > 0 else None


def load_policy(
    path: str, device: Any, args: argparse.Namespace, resumes: bool = False, is_frozen: bool = False
) -> tuple["PreTrainedModel", Any]:
    """The model with fp32 masters on `device`, those of the checkpoint where the run `resumes`; the dtype that it came in.

    One that `is_frozen`, below an adapter, has no masters: on a GPU it is in bf16, and never lies there in float32.

    Raises:
        ValueError: there is no such model; one line.
    """
    import torch

    from ludic.train.checkpoint import masters_folder
    from ludic.train.master_weights import cast_parameters

    config = load_full_config(path, trust_remote_code=args.trust_remote_code)
    weights = masters_folder(Path(path)) if resumes else path  # a new run starts from what is served
    model = load_model(weights, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
    if is_frozen and torch.device(device).type == "cuda":
        cast_parameters(model, torch.bfloat16)
    return torch.nn.Module.to(model, device), stored_dtype(config)

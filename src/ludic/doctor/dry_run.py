"""One update and one checkpoint of a small model of the same architecture, and the ids that a run sends to its server.

What is tried here is the trainer's own code (`Learner`), so its verdict is the trainer's, hours earlier. Left out: what only
a GPU's kernels or the real weights can show.
"""

import argparse
import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from ludic.config import GRPOConfig
from ludic.doctor.findings import Finding, failed, ok, warning

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ludic.train.learner import Learner

ROW = 64
"""Tokens of the sequences that the small model is trained on."""


@cache
def model_shape(model: str, trust_remote_code: bool) -> "tuple[PretrainedConfig, PreTrainedModel]":
    """The configuration, and the model on the meta device: every shape, and no memory.

    Raises:
        ValueError: there is no such model, or no causal language model; one line.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from ludic.task.pretrained import load_full_config, loading

    config = load_full_config(model, trust_remote_code=trust_remote_code)
    with loading(model, "model"), torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


@cache
def _small_learner(model: str, trust_remote_code: bool, config: GRPOConfig) -> "Learner | None":
    """The trainer's learner on a small model of this architecture, after one micro-batch; None where there is no small one.

    Raises:
        ValueError: this architecture cannot be trained; one line.
    """
    import torch

    from ludic.doctor.tiny_model import DOES_NOT_RUN, tiny_model
    from ludic.train.attention import compile_layers, prepare_packed_attention
    from ludic.train.learner import Learner
    from ludic.train.memory import worst_samples

    shape, full = model_shape(model, trust_remote_code)
    small = tiny_model(shape, full)
    if small is None:
        prepare_packed_attention(copy.deepcopy(full))
        return None
    # Sequences that a small model is quick with; a reference model would be another of the same architecture, and an adapter
    # is put into layers that the small one may not have.
    short = dataclasses.replace(
        config,
        max_seq_len=ROW,
        max_completion_len=0,
        micro_token_budget=None,
        kl_coef=0.0,
        logprob_chunk=ROW,
        overlong_buffer=0,
        lora_rank=0,
        lora_sync="merged",
    )
    try:
        learner = Learner(short, small)
        learner.add_up(worst_samples(short, ROW))
        if config.compile and torch.cuda.is_available():
            compile_layers(small)  # only marks them; nothing is forwarded any more
    except ValueError:  # the trainer's own words
        raise
    except DOES_NOT_RUN as error:
        raise ValueError(f"{type(small).__name__} does not run on packed rows ({_line(error):.200})") from error
    return learner


def check_architecture(args: argparse.Namespace, config: GRPOConfig) -> Finding:
    """Can a model of this architecture be trained on packed rows?"""
    from ludic.task.architectures import OTHER_FAMILY

    try:
        learner = _small_learner(args.model, args.trust_remote_code, config)
    except ValueError as error:
        reason = str(error).removesuffix(f"; {OTHER_FAMILY}")
        return failed("architecture", reason, OTHER_FAMILY)
    if learner is None:
        name = type(model_shape(args.model, args.trust_remote_code)[1]).__name__
        said = f"no small {name} could be built, so only its settings were looked at"
        return warning("architecture", said, "the trainer proves it on the model itself, once it is loaded")
    return ok("architecture", f"a small {type(learner.model).__name__} trains on packed rows")


def check_saving(args: argparse.Namespace, config: GRPOConfig, tokenizer: "PreTrainedTokenizerBase") -> Finding:
    """Can a checkpoint be written, with these configurations and this tokenizer, and loaded again?"""
    from transformers import GenerationConfig

    shape, _ = model_shape(args.model, args.trust_remote_code)
    settings = GenerationConfig()
    with contextlib.suppress(OSError):  # there is none: transformers makes it of the configuration's ids
        settings = GenerationConfig.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        for what, part in (("config.json", shape), ("generation_config.json", settings), ("the tokenizer", tokenizer)):
            try:
                part.save_pretrained(folder)
            except (ValueError, TypeError, AttributeError, OSError) as error:
                said = f"{what} of {args.model} cannot be saved, so no checkpoint could be written: {_line(error):.400}"
                fix = "mend it in a copy of the folder, and give that with --model"
                if part is settings:
                    fix += " (set do_sample to true, or take the sampling values out; training reads none)"
                return failed("saving", said, fix)
    try:
        learner = _small_learner(args.model, args.trust_remote_code, config)
    except ValueError:
        learner = None  # `check_architecture` says it
    if learner is None:
        return ok("saving", "configuration, generation config and tokenizer can be saved")
    return _check_round_trip(learner)


def _check_round_trip(learner: "Learner") -> Finding:
    """Save the small model as a checkpoint is, and load it as --resume does."""
    import torch

    from ludic.doctor.tiny_model import DOES_NOT_RUN
    from ludic.task.pretrained import load_model

    name = type(learner.model).__name__
    weights = learner.masters.state_dict(learner.model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            learner.model.save_pretrained(folder, state_dict=dict(weights))  # which it empties
            loaded = load_model(folder, dtype=torch.float32).state_dict()
        except DOES_NOT_RUN as error:
            said = f"{name} cannot be saved and loaded again: {_line(error):.300}"
            return failed("saving", said, "train another model")
    for key, tensor in weights.items():
        if key not in loaded or not torch.equal(tensor, loaded[key]):
            said = f"{name} is another one after it was saved and loaded: {key} differs"
            return failed("saving", said, "train another model")
    return ok("saving", f"a small {name} and its tokenizer are the same after they were saved and loaded")


def check_token_ids(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", prompt_token_ids: Iterable[int]
) -> Finding:
    """Has the embedding a row for each id of the prompts, and for the tokens that end a sequence?"""
    import torch

    from ludic.inference.client.vllm_client import stop_token_ids

    shape, full = model_shape(args.model, args.trust_remote_code)
    weight = full.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    # No padding token: neither engine sends one to the model.
    used = {
        "the prompts hold": set(prompt_token_ids),
        "a turn ends with": set(stop_token_ids(args.model, tokenizer, shape)),
    }
    rows = weight.shape[0]
    for use, ids in used.items():
        if beyond := [token_id for token_id in ids if not 0 <= token_id < rows]:
            name = f"{tokenizer.convert_ids_to_tokens(max(beyond))!r} (id {max(beyond)})"
            fix = "give the tokenizer and the chat template that belong to this model"
            return failed("token ids", f"{use} {name}, but the embedding has {rows} rows", fix)
    return ok("token ids", f"the largest that is used is {max(set().union(*used.values()))}, of {rows} rows")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

"""One update and one checkpoint of a small model of the same architecture, and the ids that a run sends to its server.

An architecture that cannot be trained, a checkpoint that cannot be written, an id that the embedding has no row for: each
of them otherwise shows minutes or hours later, with a server running. What is tried here is the trainer's own code
(`Learner`), so its verdict is the trainer's. Left out: what only a GPU's kernels or the real weights can show.
"""

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ludic.config import GRPOConfig
from ludic.doctor.findings import Finding, failed, ok, warning

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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
    """The trainer's learner on a small model of this architecture, after the gradient of one micro-batch; None where no
    small model can be built.

    Raises:
        ValueError: this architecture cannot be trained; one line.
    """
    from ludic.doctor.tiny_model import DOES_NOT_RUN, tiny_model
    from ludic.train.attention import compile_layers, prepare_packed_attention
    from ludic.train.learner import Learner
    from ludic.train.memory import worst_samples

    shape, full = model_shape(model, trust_remote_code)
    small = tiny_model(shape, full)
    if small is None:
        prepare_packed_attention(copy.deepcopy(full))
        return None
    # Sequences that a small model is quick with; a reference model would be another of the same architecture.
    short = dataclasses.replace(
        config, max_seq_len=ROW, max_completion_len=0, micro_token_budget=None, kl_coef=0.0, logprob_chunk=ROW
    )
    try:
        learner = Learner(short, small)
        learner.accumulate(worst_samples(short, ROW))
        if config.compile and _has_gpu():
            compile_layers(small)  # only marks them; nothing is forwarded any more
    except ValueError:  # the trainer's own words
        raise
    except DOES_NOT_RUN as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(small).__name__} does not run on packed rows ({reason:.200})") from error
    return learner


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
        return warning(
            "architecture",
            f"no small {name} could be built, so only its settings were looked at",
            "the trainer proves it on the model itself, once it is loaded",
        )
    return ok("architecture", f"a small {type(learner.model).__name__} trains on packed rows")


def check_saving(args: argparse.Namespace, config: GRPOConfig, tokenizer: "PreTrainedTokenizerBase") -> Finding:
    """Can a checkpoint be written, with these configurations and this tokenizer, and loaded again?"""
    shape, _ = model_shape(args.model, args.trust_remote_code)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saves: dict[str, Callable[[Path], object]] = {
            "config.json": shape.save_pretrained,
            "generation_config.json": _generation_config(args.model).save_pretrained,
            "the tokenizer": tokenizer.save_pretrained,
        }
        for what, save in saves.items():
            try:
                save(folder)
            except (ValueError, TypeError, AttributeError, OSError) as error:
                reason = " ".join(str(error).split())
                return failed(
                    "saving",
                    f"{what} of {args.model} cannot be saved, so no checkpoint could be written: {reason:.400}",
                    f"mend it in a copy of the folder, and give that with --model{_MENDS.get(what, '')}",
                )
    try:
        learner = _small_learner(args.model, args.trust_remote_code, config)
    except ValueError:
        learner = None  # `check_architecture` says it
    if learner is None:
        return ok("saving", "configuration, generation config and tokenizer can be saved")
    return _check_round_trip(learner)


_MENDS = {"generation_config.json": " (set do_sample to true, or take the sampling values out; training reads none)"}


def _generation_config(model: str) -> "GenerationConfig":
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # there is none: transformers makes it of the configuration's ids
        return GenerationConfig()


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
            reason = " ".join(str(error).split())
            return failed("saving", f"{name} cannot be saved and loaded again: {reason:.300}", "train another model")
    differing = [key for key, tensor in weights.items() if key not in loaded or not torch.equal(tensor, loaded[key])]
    if differing:
        return failed("saving", f"{name} is another one after it was saved and loaded: {differing[0]} differs",
                      "train another model")  # fmt: skip
    return ok("saving", f"a small {name} and its tokenizer are the same after they were saved and loaded")


def check_token_ids(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", prompt_token_ids: Iterable[int]
) -> list[Finding]:
    """Has the embedding a row for each id of the prompts, and for the tokens that end, begin and fill up a sequence?"""
    import torch

    from ludic.inference.client.vllm_client import stop_token_ids

    shape, full = model_shape(args.model, args.trust_remote_code)
    weight = full.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    rows = weight.shape[0]
    fix = "give the tokenizer and the chat template that belong to this model"
    prompts = set(prompt_token_ids)
    stops = stop_token_ids(args.model, tokenizer, shape)
    used = {"the prompts hold": prompts, "a turn ends with": set(stops)}
    if args.engine == "local" and tokenizer.pad_token_id is not None:
        used["rows are filled up with"] = {tokenizer.pad_token_id}
    for use, ids in used.items():
        if beyond := [token_id for token_id in ids if not 0 <= token_id < rows]:
            return [
                failed("token ids", f"{use} {_named(tokenizer, max(beyond))}, but the embedding has {rows} rows", fix)
            ]
    unused = {
        name: token_id
        for source, of in (("tokenizer", tokenizer), ("config.json", shape.get_text_config()))
        for kind in ("pad", "bos")
        if isinstance(token_id := getattr(of, f"{kind}_token_id", None), int) and token_id >= rows
        for name in [f"the {kind} token of the {source}"]
    }
    findings = [
        warning("token ids", f"{name} is {_named(tokenizer, token_id)}, but the embedding has {rows} rows",
                "no prompt of this run holds it; others that use this model may")
        for name, token_id in unused.items()
    ]  # fmt: skip
    largest = max([*prompts, *stops], default=0)
    return findings or [ok("token ids", f"the largest that is used is {largest}, of {rows} rows")]


def _named(tokenizer: "PreTrainedTokenizerBase", token_id: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token_id)!r} (id {token_id})"

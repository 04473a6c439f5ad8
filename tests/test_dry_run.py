"""The dry run says before a run what the trainer would say in it: which architectures, which files, which token ids."""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from ludic.config import GRPOConfig, from_arguments
from ludic.doctor import dry_run
from ludic.doctor.__main__ import build_parser
from ludic.doctor.dry_run import check_architecture, check_saving, check_token_ids
from ludic.doctor.tiny_model import MAX_PARAMETERS, tiny_model
from ludic.task.architectures import OTHER_FAMILY
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.train.learner import Learner
from ludic.train.memory import worst_samples
from tests.vllm_helpers import CHAT_TEMPLATE, make_tiny_model, make_tiny_tokenizer, randomize_weights

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": ({}, None),
    "mistral": ({"sliding_window": 4}, None),
    "qwen2": ({}, None),
    "qwen3": ({"head_dim": 16}, None),
    "qwen3_moe": ({**EXPERTS, "num_experts": 4, "head_dim": 16}, None),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, None),
    "gemma": ({"head_dim": 16}, None),
    "gemma3_text": ({"head_dim": 16, **WINDOWS}, None),
    "phi": ({}, None),
    "phi3": ({}, None),
    "olmo": ({}, None),
    "olmo2": ({}, None),
    "smollm3": ({"no_rope_layers": [1, 0]}, None),
    "granite": ({"logits_scaling": 4.0, "residual_multiplier": 0.3}, None),
    "gpt_neox": ({}, None),
    "gpt2": ({"n_positions": 128}, None),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, None),
    "biogpt": ({}, None),
    "starcoder2": ({}, None),
    "cohere2": ({**WINDOWS, "logit_scale": 0.25}, None),
    "glm4": ({"head_dim": 16}, None),
    "deepseek_v3": (
        {
            **EXPERTS,
            **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
            **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            "num_key_value_heads": 4,
        },
        None,
    ),
    "afmoe": ({**EXPERTS, "num_experts": 4, "head_dim": 16, "num_dense_layers": 1, **WINDOWS}, None),
    "gemma2": ({"head_dim": 16, **WINDOWS}, "caps its attention logits at 50.0"),
    "stablelm": ({}, "handed on to every layer"),
    "falcon": ({}, "does not use transformers' attention interface"),
    "bloom": ({"n_head": 4}, "does not use transformers' attention interface"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "does not use transformers' attention interface"),
    "mamba": ({}, "layers of type linear_attention"),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "n_groups": 2}, "layers of type linear_attention"),
    "qwen3_next": (
        {
            **EXPERTS,
            **{"num_experts": 4, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 16},
            "layer_types": ["linear_attention", "full_attention"],
        },
        "layers of type linear_attention",
    ),
    "gpt_oss": (
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS},
        "cannot honour attention sinks",
    ),
    "llama4_text": (
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "layer_types": ["chunked_attention"] * 2},
        "layers of type chunked_attention",
    ),
    "git": ({"vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}},
            "lets packed sequences see each other"),
    "bert": ({}, "attention in both directions"),
}  # fmt: skip
"""Settings of a small model of each family, and why it cannot be trained; None where it can."""


def arguments(folder: Path, *flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["--model", str(folder), "--max-seq-len", "128", *flags])


def full_size(family: str) -> PretrainedConfig:
    """As large as transformers makes it by default: 0.1 to 700 billion parameters."""
    return AutoConfig.for_model(family)


def trainers_words(family: str, config: GRPOConfig) -> str:
    """What the trainer says of a small model of a family with weights of its own; empty if it trains it."""
    settings, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SHAPE, **settings}), dtype=torch.float32)
    randomize_weights(model, seed=0)
    try:
        learner = Learner(config, model)
        learner.accumulate(worst_samples(config, config.max_seq_len))
        assert learner.step(learning_rate=1e-6)["skipped_update"] == 0
    except ValueError as error:
        return str(error)
    return ""


def without_figures(words: str) -> str:
    return re.sub(r"\(relative difference .*?\)", "", words)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dry_run_of_a_full_size_model_says_what_the_trainer_says_of_the_family(family: str, tmp_path: Path) -> None:
    full_size(family).save_pretrained(tmp_path)
    args = arguments(tmp_path)
    finding = check_architecture(args, from_arguments(args))
    words, (_, reason) = trainers_words(family, GRPOConfig(max_seq_len=64)), FAMILIES[family]
    assert (finding.status == "ok") == (words == ""), (str(finding), words)
    if reason is None:
        assert finding.status == "ok", str(finding)
    else:
        assert finding.status == "failed" and reason in finding.found and finding.fix == OTHER_FAMILY
        assert without_figures(words.removesuffix(f"; {OTHER_FAMILY}")) == without_figures(finding.found)
        assert "\n" not in str(finding)


@pytest.mark.parametrize("family", ["gemma3_text", "smollm3", "qwen3_next", "deepseek_v3", "llama4_text"])
def test_the_small_model_has_every_kind_of_layer_and_heads_of_the_same_size(family: str) -> None:
    config = full_size(family)
    with torch.device("meta"):
        full = AutoModelForCausalLM.from_config(config)
    before = config.to_dict()
    small = tiny_model(config, full)
    assert small is not None and config.to_dict() == before
    assert small.num_parameters() < MAX_PARAMETERS
    ours, theirs = small.config.to_dict(), config.to_dict()
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if theirs.get(key):
            assert set(ours[key]) == set(theirs[key]) and len(ours[key]) == ours["num_hidden_layers"]
            assert ours[key] == theirs[key][: len(ours[key])]
    assert ours.get("head_dim") == theirs.get("head_dim") and ours.get("sliding_window") == theirs.get("sliding_window")
    grouped = [shape["num_key_value_heads"] < shape["num_attention_heads"] for shape in (ours, theirs)]
    assert grouped[0] == grouped[1]


def test_a_model_of_which_no_small_one_can_be_built_is_judged_by_its_settings(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ludic.doctor.tiny_model.MAX_PARAMETERS", 0)
    dry_run._small_learner.cache_clear()
    args = arguments(tiny_model_dir)
    finding = check_architecture(args, from_arguments(args))
    dry_run._small_learner.cache_clear()
    assert finding.status == "warning" and "only its settings were looked at" in finding.found


def test_the_dry_run_of_an_ordinary_model_takes_seconds_and_draws_nothing_from_the_runs_generator(
    tmp_path: Path,
) -> None:
    full_size("qwen2").save_pretrained(tmp_path)  # 8 billion parameters
    make_tiny_tokenizer().save_pretrained(tmp_path)
    args = arguments(tmp_path)
    config, tokenizer = from_arguments(args), load_tokenizer(tmp_path)
    before, started = torch.get_rng_state(), time.process_time()
    assert check_architecture(args, config).status == "ok"
    assert check_saving(args, config, tokenizer).status == "ok"
    assert time.process_time() - started < 5
    assert torch.equal(torch.get_rng_state(), before)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path, tie_word_embeddings=True)
    return tmp_path


def test_a_generation_config_that_no_checkpoint_could_save_is_refused_with_what_to_change(folder: Path) -> None:
    args = arguments(folder)
    path = folder / "generation_config.json"
    assert check_saving(args, from_arguments(args), load_tokenizer(folder)).status == "ok"
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.7, "eos_token_id": 1}))
    finding = check_saving(args, from_arguments(args), load_tokenizer(folder))
    assert finding.status == "failed" and "temperature" in finding.found and "do_sample" in finding.fix
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "eos_token_id": 1}))
    assert check_saving(args, from_arguments(args), load_tokenizer(folder)).status == "ok"
    model = AutoModelForCausalLM.from_pretrained(folder)  # and the trainer would not have saved it, indeed
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.7)
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(folder / "checkpoint")


def test_weights_that_come_back_as_others_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ludic.task import pretrained

    load_model = pretrained.load_model

    def one_is_lost(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        torch.nn.init.zeros_(model.get_parameter("model.norm.weight"))
        return model

    monkeypatch.setattr(pretrained, "load_model", one_is_lost)
    args = arguments(folder)
    finding = check_saving(args, from_arguments(args), load_tokenizer(folder))
    assert finding.status == "failed" and "model.norm.weight differs" in finding.found


# --- token ids --------------------------------------------------------------------------------------------------------


def test_a_template_with_an_id_beyond_the_embedding_is_refused_with_the_token_the_id_and_the_rows(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|extra_{i}|>" for i in range(300)]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>", "<|extra_299|>")
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "1 + 1"}])
    finding = check_token_ids(arguments(folder), tokenizer, prompt)
    assert finding.status == "failed"
    assert f"'<|extra_299|>' (id {max(prompt)})" in finding.found and "512 rows" in finding.found
    finding = check_token_ids(arguments(folder), tokenizer, [5, 6])
    assert finding.status == "ok"  # tokens that no prompt holds do no harm


@pytest.mark.parametrize("place", ["tokenizer", "config.json", "generation_config.json"])
def test_a_stop_token_beyond_the_embedding_is_refused_wherever_it_stands(folder: Path, place: str) -> None:
    tokenizer = load_tokenizer(folder)
    if place == "tokenizer":
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<|extra_{i}|>" for i in range(300)]})
        tokenizer.eos_token = "<|extra_299|>"
    else:
        settings = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps({**settings, "eos_token_id": 600}))
    dry_run.model_shape.cache_clear()
    finding = check_token_ids(arguments(folder), tokenizer, [5])
    assert finding.status == "failed" and "a turn ends with" in finding.found and "512 rows" in finding.found


@pytest.mark.parametrize("engine", ["vllm", "local"])
def test_a_padding_token_beyond_the_embedding_does_no_harm(folder: Path, engine: str) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|extra_{i}|>" for i in range(300)]})
    tokenizer.pad_token = "<|extra_299|>"
    finding = check_token_ids(arguments(folder, "--engine", engine), tokenizer, [5])
    assert finding.status == "ok" and "512 rows" in finding.found

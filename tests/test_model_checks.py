"""What is trained is the policy that sampled: no dropout, no noise, no neighbour, at lengths where windows and RoPE act."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BioGptConfig,
    BioGptForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from ludic.config import GRPOConfig
from ludic.rollout.local import LocalEngine
from ludic.task.rope import longrope_switch, pin_rope
from ludic.train import attention
from ludic.train.attention import prepare_packed_attention
from ludic.train.learner import Learner
from ludic.train.logprobs import token_logprobs
from ludic.train.model_checks import check_isolation, check_mode
from ludic.train.packing import pack
from ludic.types import MicroBatch, SamplingParams, TrainingSample

MAX_SEQ_LEN = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8}
_EXPERTS: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2, "num_local_experts": 4}
_OPT: dict[str, Any] = {
    **{name: _SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "init_std": 0.2},
}
_GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

NOISY: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "starcoder2": lambda: Starcoder2ForCausalLM(
        Starcoder2Config(**_SHAPE, num_key_value_heads=2, residual_dropout=0.1)
    ),
    "seed_oss": lambda: SeedOssForCausalLM(SeedOssConfig(**_GROUPED)),
    "biogpt": lambda: BioGptForCausalLM(BioGptConfig(**_SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_EXPERTS, router_jitter_noise=0.1)),
    "phimoe": lambda: PhimoeForCausalLM(PhimoeConfig(**_EXPERTS, router_jitter_noise=0.1, input_jitter_noise=0.1)),
}
"""Families that drop out or jitter in training mode, at the defaults of their configurations or with the noise switched on."""


def _longrope(**more: float) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 8.0]}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors, **more}


LENGTH_BOUND: dict[str, Callable[[], PreTrainedModel]] = {
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(**_GROUPED, original_max_position_embeddings=32, rope_parameters=_longrope())
    ),
    "longrope with a window": lambda: Phi3ForCausalLM(
        Phi3Config(**_GROUPED, original_max_position_embeddings=32, rope_parameters=_longrope(), sliding_window=16)
    ),
    "longrope of one type of layers": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_GROUPED,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": _longrope(),
            },
        )
    ),
    "dynamic": lambda: LlamaForCausalLM(
        LlamaConfig(**_GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    ),
    "window": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=16)),
    "yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_GROUPED,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
            },
        )
    ),
}  # fmt: skip


def _model(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return make()


def _qwen2() -> PreTrainedModel:
    return _model(lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)))


def _learner(model: PreTrainedModel, **settings: Any) -> Learner:
    config = GRPOConfig(max_seq_len=MAX_SEQ_LEN, rollouts_per_update=8, group_size=4, **settings)
    return Learner(config, model)


def _sample(ids: list[int], prompt: int = 2) -> TrainingSample:
    mask = [i >= prompt for i in range(len(ids))]
    return TrainingSample(token_ids=ids, loss_mask=mask, rollout_logprobs=None, advantage=1.0)


def _row(lengths: tuple[int, ...]) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    samples = [_sample(torch.randint(1, 97, (length,), generator=generator).tolist()) for length in lengths]
    (row,) = pack(samples, token_budget=sum(lengths), normalisation="token_mean")
    return row


def _alone(model: PreTrainedModel, row: MicroBatch) -> torch.Tensor:
    """[T] log-probs by one plain forward in `eval()` a sequence."""
    found = []
    for ids in row.input_ids.split(row.cu_seqlens.diff().tolist()):
        logprobs = model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1)
        found.append(torch.cat([logprobs.new_zeros(1), logprobs]))
    return torch.cat(found) * row.loss_mask


# -- the mode that trains ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", NOISY)
def test_the_trainer_computes_the_log_probs_of_evaluation_mode(family: str, recomputed: bool) -> None:
    model, row = _model(NOISY[family]), _row((20, 9))
    model.eval()
    with torch.no_grad():
        expected = _alone(model, row)
    model.train()
    _learner(model, gradient_checkpointing=recomputed)
    trained = [token_logprobs(model, row, temperature=1.0).logprobs for _ in range(2)]
    assert trained[0].requires_grad and torch.equal(trained[0], trained[1])
    torch.testing.assert_close(trained[0].detach(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", NOISY)
def test_a_model_in_training_mode_is_found_at_start_by_name(family: str) -> None:
    model = _model(NOISY[family])
    prepare_packed_attention(model)
    check_mode(model)
    # The attention of a layer refuses dropout by itself; what is looked for here is in no attention.
    for name, module in model.named_modules():
        module.training = "attn" not in name and "attention" not in name
    with pytest.raises(ValueError, match=f"{type(model).__name__} gives the same row other log-probs when it trains"):
        check_mode(model)


def test_noise_that_evaluation_mode_does_not_switch_off_is_found_at_start() -> None:
    model = _qwen2()
    model.get_submodule("model.layers.0.mlp").register_forward_hook(
        lambda _module, _inputs, output: torch.nn.functional.dropout(
            output, 0.1
        )  # torch's own default: it always drops
    )
    prepare_packed_attention(model)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM gives the same row other log-probs when it trains"):
        check_mode(model)


# -- what the other sequences of a row may change ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LENGTH_BOUND)
def test_a_short_sequence_is_what_it_is_alone_behind_one_beyond_the_original_context(kind: str) -> None:
    model = _model(LENGTH_BOUND[kind])
    _learner(model)
    for lengths in ((MAX_SEQ_LEN, 9), (9, MAX_SEQ_LEN), (9, 40, 7)):
        row = _row(lengths)
        packed = token_logprobs(model, row, temperature=1.0).logprobs.detach()
        for ids, found in zip(row.input_ids.split(list(lengths)), packed.split(list(lengths)), strict=True):
            (one,) = pack([_sample(ids.tolist())], token_budget=len(ids), normalisation="token_mean")
            alone = token_logprobs(model, one, temperature=1.0).logprobs.detach()
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["longrope", "longrope with a window"])
def test_a_neighbour_that_changes_the_frequencies_is_found_at_start(kind: str) -> None:
    model = _model(LENGTH_BOUND[kind])
    prepare_packed_attention(model)
    with pytest.raises(ValueError, match=r"lets packed sequences see each other .* up to --max-seq-len (16|32)"):
        check_isolation(model, max_seq_len=MAX_SEQ_LEN)
    check_isolation(model, max_seq_len=16)  # no row is ever long enough


async def test_the_local_engine_samples_with_the_frequencies_that_are_trained_on_beyond_the_switch_too(
    tmp_path: Path,
) -> None:
    model = _model(LENGTH_BOUND["longrope"])
    model.save_pretrained(tmp_path)
    _learner(model)
    engine = LocalEngine.from_pretrained(tmp_path, eos_token_ids=(), context_len=MAX_SEQ_LEN)
    prompts = [[3, 4, 5], [*range(1, 20)]]
    for prompt in prompts:
        (completion,) = await engine.generate(prompt, num_completions=1, sampling=SamplingParams(max_tokens=40, seed=1))
        ids = [*prompt, *completion.token_ids]
        (row,) = pack([_sample(ids, len(prompt))], token_budget=len(ids), normalisation="token_mean")
        trained = token_logprobs(model, row, temperature=1.0).logprobs[len(prompt) :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), trained.detach(), atol=1e-4, rtol=0)
    await engine.aclose()


@pytest.mark.parametrize("context", [32, 33])
def test_long_factors_are_taken_from_the_context_on_at_which_vllm_takes_them(context: int) -> None:
    model, row = _model(LENGTH_BOUND["longrope"]), _row((9,))
    assert longrope_switch(model.config) == 32
    short, long = (torch.tensor(model.config.rope_parameters[name]) for name in ("short_factor", "long_factor"))
    unscaled = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    prepare_packed_attention(model)
    pin_rope(model, context)
    token_logprobs(model, row, temperature=1.0)
    expected = unscaled / (long if context > 32 else short)
    torch.testing.assert_close(model.get_buffer("model.rotary_emb.inv_freq"), expected)


def test_a_model_whose_rope_cannot_be_pinned_is_refused_with_the_length_that_it_can_be_trained_at() -> None:
    def make() -> PreTrainedModel:
        rope = _longrope(short_mscale=1.0, long_mscale=1.5)
        return PhimoeForCausalLM(PhimoeConfig(**_EXPERTS, rope_parameters=rope))

    with pytest.raises(ValueError, match=r"PhimoeForCausalLM lets packed .* up to --max-seq-len 32 it does not"):
        _learner(_model(make))


def test_dynamic_rope_beyond_the_context_that_vllm_has_positions_for_is_refused() -> None:
    model = _model(LENGTH_BOUND["dynamic"])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has RoPE of the type dynamic, .* lower --max-seq-len 257"):
        pin_rope(model, 257)


def test_a_window_that_is_seen_from_the_wrong_place_is_found_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(LENGTH_BOUND["window"])
    one_by_one: Callable[..., torch.Tensor] = attention._one_by_one
    prepare_packed_attention(model)

    def narrower_in_a_row(*arguments: Any) -> torch.Tensor:
        *others, boundaries, scale, window = arguments
        several = len(boundaries[0]) > 2
        return one_by_one(*others, boundaries, scale, window - 1 if several else window)

    monkeypatch.setattr(attention, "_one_by_one", narrower_in_a_row)
    check_isolation(model, max_seq_len=16)  # what five tokens can show
    with pytest.raises(ValueError, match=r"MistralForCausalLM lets packed sequences see each other .* at 21 tokens"):
        check_isolation(model, max_seq_len=MAX_SEQ_LEN)


def test_the_check_at_start_finds_positions_mixed_outside_of_attention() -> None:
    model = _qwen2()
    prepare_packed_attention(model)
    # A short convolution, as hybrid models have, that does not know where a sequence begins.
    model.get_submodule("model.layers.0.mlp").register_forward_hook(
        lambda _m, _i, output: output + output.roll(1, dims=1)
    )
    with pytest.raises(ValueError, match="Qwen2ForCausalLM lets packed sequences see each other"):
        check_isolation(model, max_seq_len=MAX_SEQ_LEN)


def test_the_check_at_start_finds_a_prompt_that_is_not_seen_as_the_sequences_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, gathered = _qwen2(), attention._gathered
    prepare_packed_attention(model)

    def without_the_second_token(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        shares = indices.numel() > states.shape[2]
        return gathered(states, torch.where(indices == 1, 0, indices) if shares else indices)

    monkeypatch.setattr(attention, "_gathered", without_the_second_token)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM does not see a shared prompt as it sees its own"):
        check_isolation(model, max_seq_len=MAX_SEQ_LEN)

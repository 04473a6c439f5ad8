"""The in-process engine: its numbers are the model's, its randomness is each completion's own, its hand-over is proven."""

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ludic.rollout.engine import PolicyWeights
from ludic.rollout.local import LocalEngine
from ludic.rollout.local_decoding import ATTENTION_NAME, decoding_attention, inverse_cdf, keep_nucleus
from ludic.types import Completion, SamplingParams

VOCAB_SIZE = 48
EOS = (1, 2)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20], [30, 31, 32, 33, 34]]
MakeEngine = Callable[..., LocalEngine]


def llama(*, seed: int = 0, tied: bool = True, context: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=tied, initializer_range=0.15,
        )
    ).eval()  # fmt: skip


def qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
        )
    ).eval()  # fmt: skip


def gemma() -> GemmaForCausalLM:
    torch.manual_seed(0)
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.15,
        )
    ).eval()  # fmt: skip


def mistral() -> MistralForCausalLM:
    """Its layers see 4 tokens only, fewer than the prompts and completions here have."""
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15, sliding_window=4,
        )
    ).eval()  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.15)
    ).eval()


_SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
_MAMBA_HEADS: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({}, r"Gemma2ForCausalLM caps its attention logits at 50\.0"),
    "vaultgemma": ({}, r"VaultGemmaForCausalLM caps its attention logits at 50\.0"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "has layers of type conv"),
    "bamba": (_MAMBA_HEADS | {"attn_layer_indices": [1]}, "BambaForCausalLM has layers of type linear_attention"),
    "granitemoehybrid": (
        _MAMBA_HEADS | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "shared_intermediate_size": 32},
        "GraniteMoeHybridForCausalLM has layers of type linear_attention",
    ),
    "mamba": ({"state_size": 4}, "MambaForCausalLM has layers of type linear_attention"),
    "gpt_oss": ({"num_local_experts": 4}, "GptOssForCausalLM does not run with the local engine"),
    "rwkv": ({}, "RwkvForCausalLM computes something else"),
    "recurrent_gemma": ({"lru_width": 32, "num_hidden_layers": 3}, "RecurrentGemmaForCausalLM computes something else"),
}
"""Families that sdpa, a cache or padding would change without a word, or that ended in a trace."""


def of_type(model_type: str, **settings: Any) -> PreTrainedModel:
    """A small model of that type with weights that are large enough for its attention to matter."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**_SMALL | settings))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_this_process_would_decode_wrong_is_refused_in_a_line_with_a_way_out(model_type: str) -> None:
    settings, said = REFUSED[model_type]
    with pytest.raises(ValueError, match=said) as refused:
        LocalEngine(of_type(model_type, **settings), eos_token_ids=EOS)
    assert str(refused.value).endswith("; decode it with a vLLM server (--engine vllm)")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_an_option_that_sdpa_would_leave_out_is_refused_where_it_is_met(name: str) -> None:
    states = torch.zeros(1, 2, 1, 8)
    attend: Any = decoding_attention
    attend(torch.nn.Identity(), states, states, states, None, **{name: None})
    with pytest.raises(ValueError, match=name):
        attend(torch.nn.Identity(), states, states, states, None, **{name: torch.ones(2)})


@pytest.mark.parametrize("model_type", ["cohere2", "llama4_text", "gptj", "olmo2", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_families_pass_the_trial(model_type: str, dtype: torch.dtype) -> None:
    more: dict[str, dict[str, Any]] = {
        "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 64},
        "gptj": {"rotary_dim": 8},
    }
    model = of_type(model_type, **more.get(model_type, {}))
    LocalEngine(model, eos_token_ids=EOS, dtype=dtype)


@pytest.fixture
async def make_engine() -> AsyncIterator[MakeEngine]:
    async with AsyncExitStack() as stack:

        def make(model: PreTrainedModel, *, eos: tuple[int, ...] = EOS, **options: object) -> LocalEngine:
            engine = LocalEngine(model, eos_token_ids=eos, **options)  # type: ignore[arg-type]
            stack.push_async_callback(engine.aclose)
            return engine

        yield make


async def draw(engine: LocalEngine, sampling: SamplingParams, *, n: int = 4) -> list[list[Completion]]:
    return await asyncio.gather(*(engine.generate(prompt, num_completions=n, sampling=sampling) for prompt in PROMPTS))


def trainer_logprobs(
    model: PreTrainedModel, prompt: list[int], completion: Completion, temperature: float
) -> torch.Tensor:
    """What one unpadded, uncached forward pass says of the completion's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("make_model", [llama, qwen2, gemma, mistral, gpt2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_are_those_of_a_plain_forward_pass_at_the_sampling_temperature(
    make_engine: MakeEngine, make_model: Callable[[], PreTrainedModel], temperature: float
) -> None:
    model = make_model()
    engine = make_engine(model, max_batch_size=5)
    groups = await draw(engine, SamplingParams(temperature=temperature, max_tokens=12, seed=3))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = trainer_logprobs(model, prompt, completion, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


async def test_every_family_here_decodes_with_the_attention_that_copies_no_keys(make_engine: MakeEngine) -> None:
    for make_model in (llama, qwen2, gemma, mistral, gpt2):
        assert make_engine(make_model())._model.config._attn_implementation == ATTENTION_NAME


async def test_greedy_tokens_are_those_of_transformers_and_their_logprobs_are_untempered(
    make_engine: MakeEngine,
) -> None:
    model = llama()
    groups = await draw(make_engine(model), SamplingParams(temperature=0, max_tokens=10), n=2)
    for prompt, (first, second) in zip(PROMPTS, groups, strict=True):
        expected = model.generate(  # type: ignore[misc]  # transformers types `self` as a protocol of its own
            torch.tensor([prompt]), do_sample=False, max_new_tokens=10, eos_token_id=list(EOS)
        )
        assert first.token_ids == second.token_ids == expected[0, len(prompt) :].tolist()
        torch.testing.assert_close(
            torch.tensor(first.logprobs), trainer_logprobs(model, prompt, first, 1.0), atol=1e-4, rtol=0
        )


async def test_a_stopped_completion_ends_with_its_stop_token_and_a_truncated_one_has_none(
    make_engine: MakeEngine,
) -> None:
    groups = await draw(make_engine(llama()), SamplingParams(max_tokens=14, seed=0), n=16)
    reasons = {"stop": 0, "length": 0}
    for completion in (completion for group in groups for completion in group):
        reasons[completion.finish_reason] += 1
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
        assert not set(completion.token_ids[:-1]) & set(EOS)
        if completion.finish_reason == "stop":
            assert completion.token_ids[-1] in EOS
        else:
            assert completion.token_ids[-1] not in EOS and len(completion.token_ids) == 14
    assert min(reasons.values()) > 0


async def test_a_run_repeats_bit_for_bit(make_engine: MakeEngine) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=12, seed=5)
    first = await draw(make_engine(llama(), max_batch_size=7), sampling)
    assert await draw(make_engine(llama(), max_batch_size=7), sampling) == first


async def test_a_completion_does_not_depend_on_its_batch(make_engine: MakeEngine) -> None:
    sampling = SamplingParams(max_tokens=12, seed=5)
    together = await draw(make_engine(llama(), max_batch_size=64), sampling)
    engine = make_engine(llama(), max_batch_size=1)
    for prompt, group in zip(PROMPTS, together, strict=True):
        alone = await engine.generate(prompt, num_completions=4, sampling=sampling)
        assert [completion.token_ids for completion in alone] == [completion.token_ids for completion in group]


async def test_members_of_a_group_and_seeds_differ(make_engine: MakeEngine) -> None:
    engine = make_engine(llama(), eos=())
    draws = [
        completion.token_ids
        for seed in (1, 2)
        for completion in await engine.generate(
            [5, 6], num_completions=3, sampling=SamplingParams(max_tokens=12, seed=seed)
        )
    ]
    assert len({tuple(token_ids) for token_ids in draws}) == 6


async def test_without_a_seed_two_calls_differ(make_engine: MakeEngine) -> None:
    engine = make_engine(llama(), eos=())
    first, second = [
        await engine.generate([5, 6], num_completions=1, sampling=SamplingParams(max_tokens=20)) for _ in range(2)
    ]
    assert first[0].token_ids != second[0].token_ids


async def test_tokens_are_drawn_with_their_probabilities(make_engine: MakeEngine) -> None:
    model, count = llama(), 4000
    engine = make_engine(model, eos=(), max_batch_size=2000)
    completions = await engine.generate(
        [5, 6, 7], num_completions=count, sampling=SamplingParams(temperature=1.3, max_tokens=1, seed=0)
    )
    drawn = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCAB_SIZE) / count
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 1.3).softmax(-1)
    tolerance = 4.5 * (expected * (1 - expected) / count).sqrt() + 1 / count
    assert ((drawn - expected).abs() < tolerance).all()


async def test_each_request_keeps_its_own_settings_in_a_shared_batch(make_engine: MakeEngine) -> None:
    engine = make_engine(gpt2(), eos=())  # learned positions: a row that ran on would index past the last one
    settings = [
        SamplingParams(temperature=0, max_tokens=57),
        SamplingParams(temperature=1.0, max_tokens=3, seed=1),
        SamplingParams(temperature=0.5, top_p=0.5, max_tokens=9, seed=2),
    ]
    long_prompt = list(range(3, 48)) + list(range(3, 19))  # 61 tokens: with 3 more the context of 64 is full
    prompts = [PROMPTS[1], long_prompt, PROMPTS[0]]

    async def ask(index: int) -> list[Completion]:
        return await engine.generate(prompts[index], num_completions=2, sampling=settings[index])

    together = await asyncio.gather(*(ask(index) for index in range(3)))
    for index in range(3):
        alone = await ask(index)
        assert [c.token_ids for c in alone] == [c.token_ids for c in together[index]]
        assert {len(c.token_ids) for c in alone} == {settings[index].max_tokens}
    assert together[0][0].token_ids == together[0][1].token_ids


def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    probs = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]])
    logits = probs.log()
    keep_nucleus(logits, torch.tensor([0.7, 1.0, 0.5]))
    expected = torch.tensor([[False, True, False, True], [True] * 4, [True, False, False, False]])
    assert torch.equal(logits.isfinite(), expected)


def test_inverse_cdf_never_chooses_a_token_of_probability_zero() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2.0**-24], dtype=torch.float64)
    assert inverse_cdf(probs, uniforms).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("tied", [True, False])
async def test_updated_weights_are_those_that_generate_and_the_version_is_stamped(
    make_engine: MakeEngine, tied: bool
) -> None:
    engine = make_engine(llama(seed=0, tied=tied))
    trained = llama(seed=1, tied=tied)
    before = await engine.generate(PROMPTS[0], num_completions=2, sampling=SamplingParams(max_tokens=8, seed=0))
    report = await engine.update_weights(PolicyWeights(trained, 7))
    after = await engine.generate(PROMPTS[0], num_completions=2, sampling=SamplingParams(max_tokens=8, seed=0))
    assert [c.policy_version for c in before] == [0, 0]
    assert [c.policy_version for c in after] == [7, 7] and engine.policy_version == report.policy_version == 7
    expected = trainer_logprobs(trained, PROMPTS[0], after[0], 1.0)
    torch.testing.assert_close(torch.tensor(after[0].logprobs), expected, atol=1e-4, rtol=0)
    assert report.num_tensors == len(list(trained.parameters())) + len(list(trained.buffers()))
    assert str(report.num_tensors) in report.proof and report.num_bytes > 0


async def test_training_does_not_reach_the_engine_before_a_sync(make_engine: MakeEngine) -> None:
    model = llama()
    engine = make_engine(model)
    sampling = SamplingParams(max_tokens=8, seed=0)
    before = await engine.generate(PROMPTS[0], num_completions=2, sampling=sampling)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert await engine.generate(PROMPTS[0], num_completions=2, sampling=sampling) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


async def test_a_copy_in_lower_precision_takes_the_rounded_weights_and_keeps_computed_buffers(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(llama(seed=0), dtype=torch.bfloat16)
    report = await engine.update_weights(PolicyWeights(llama(seed=1), 1))
    held = dict(engine._model.named_buffers())["model.rotary_emb.inv_freq"]
    assert held.dtype == torch.float32
    assert engine._model.lm_head.weight.dtype == torch.bfloat16
    assert engine._model.lm_head.weight is engine._model.model.embed_tokens.weight
    assert report.num_bytes < 3 * sum(parameter.numel() for parameter in engine._model.parameters())
    await engine.generate(PROMPTS[0], num_completions=1, sampling=SamplingParams(max_tokens=4, seed=0))


async def _decoding_has_begun(engine: LocalEngine) -> None:
    while engine._task is None or engine._queue:
        await asyncio.sleep(0)


@pytest.mark.parametrize("already_decoding", [True, False])
async def test_what_was_asked_for_before_an_update_has_the_old_weights_and_what_comes_after_it_the_new(
    make_engine: MakeEngine, already_decoding: bool
) -> None:
    engine = make_engine(llama(seed=0), eos=(), max_batch_size=1)
    sampling = SamplingParams(max_tokens=30, seed=0)
    before = asyncio.create_task(engine.generate([5, 6], num_completions=3, sampling=sampling))
    if already_decoding:
        await _decoding_has_begun(engine)
    else:
        await asyncio.sleep(0)
    update = asyncio.create_task(engine.update_weights(PolicyWeights(llama(seed=1), 1)))
    await asyncio.sleep(0)
    after = asyncio.create_task(engine.generate([5, 6], num_completions=3, sampling=sampling))
    for completions, version in ((await before, 0), (await after, 1)):
        assert [completion.policy_version for completion in completions] == [version] * 3
        for completion in completions:
            expected = trainer_logprobs(llama(seed=version), [5, 6], completion, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
    report = await update
    assert report.policy_version == 1 and report.seconds >= report.phases_s["wait"] > 0


async def test_an_update_given_up_before_its_turn_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine(llama(), eos=())
    before = asyncio.create_task(
        engine.generate([5, 6], num_completions=1, sampling=SamplingParams(max_tokens=20, seed=0))
    )
    await _decoding_has_begun(engine)
    update = asyncio.create_task(engine.update_weights(PolicyWeights(llama(seed=1), 1)))
    await asyncio.sleep(0)
    update.cancel()
    await before
    after = await engine.generate([5, 6], num_completions=1, sampling=SamplingParams(max_tokens=20, seed=0))
    assert after == await before and engine.policy_version == 0


async def test_logprobs_are_given_to_those_who_ask_and_do_not_change_what_is_drawn(make_engine: MakeEngine) -> None:
    engine = make_engine(llama())
    for temperature in (0.0, 1.0):
        asked, unasked = (
            SamplingParams(temperature=temperature, max_tokens=12, seed=3, logprobs=logprobs)
            for logprobs in (True, False)
        )
        expected = await draw(engine, asked)
        without = await draw(engine, unasked)
        assert all(completion.logprobs is None for group in without for completion in group)
        assert [[c.token_ids for c in group] for group in without] == [[c.token_ids for c in g] for g in expected]
        mixed = await asyncio.gather(
            engine.generate(PROMPTS[0], num_completions=4, sampling=unasked),
            engine.generate(PROMPTS[0], num_completions=4, sampling=asked),
        )
        assert [c.logprobs for c in mixed[0]] == [None] * 4
        assert [c.logprobs for c in mixed[1]] == [pytest.approx(c.logprobs, abs=1e-5) for c in expected[0]]


async def test_a_model_with_other_tensors_is_refused_and_nothing_is_copied(make_engine: MakeEngine) -> None:
    engine = make_engine(llama())
    held = copy.deepcopy(engine._model.state_dict())
    with pytest.raises(ValueError, match=r"tensors missing"):
        await engine.update_weights(PolicyWeights(gpt2(), 1))
    narrow = llama()
    narrow.model.norm.weight = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[16\].*\[32\]"):
        await engine.update_weights(PolicyWeights(narrow, 1))
    assert engine.policy_version == 0
    assert all(torch.equal(tensor, held[name]) for name, tensor in engine._model.state_dict().items())


async def test_a_copy_that_did_not_take_is_caught(make_engine: MakeEngine) -> None:
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    engine = make_engine(llama())
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight differs after the copy"):
        await engine.update_weights(PolicyWeights(broken, 1))
    with pytest.raises(RuntimeError, match="belong to no version"):
        await engine.generate([5], num_completions=1, sampling=SamplingParams(max_tokens=2))
    await engine.update_weights(PolicyWeights(llama(), 2))
    completion = (await engine.generate([5], num_completions=1, sampling=SamplingParams(max_tokens=2)))[0]
    assert completion.policy_version == 2

    untied = llama(tied=False)  # two different tensors for what is one tensor in the engine
    with pytest.raises(RuntimeError, match="tied on one side only"):
        await make_engine(llama(tied=True)).update_weights(PolicyWeights(untied, 1))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "empty"),
        ([5, VOCAB_SIZE], 4, "0 to 47"),
        ([5, -1], 4, "0 to 47"),
        ([5] * 60, 5, "lower max_tokens to 4"),
    ],
)
async def test_an_impossible_request_is_refused(
    make_engine: MakeEngine, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        await make_engine(llama()).generate(prompt, num_completions=1, sampling=SamplingParams(max_tokens=max_tokens))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logprobs", [True, False])
async def test_a_policy_that_has_diverged_is_an_error_for_every_caller_and_the_engine_lives_on(
    make_engine: MakeEngine, logprobs: bool, temperature: float
) -> None:
    model = llama()
    engine = make_engine(model)
    with torch.no_grad():
        engine._model.model.norm.weight.fill_(torch.nan)
    sampling = SamplingParams(temperature=temperature, max_tokens=4, seed=0, logprobs=logprobs)
    results = await asyncio.gather(
        *(engine.generate(prompt, num_completions=2, sampling=sampling) for prompt in PROMPTS), return_exceptions=True
    )
    assert all(isinstance(result, RuntimeError) and "diverged" in str(result) for result in results)
    await engine.update_weights(PolicyWeights(model, 1))
    assert len((await draw(engine, SamplingParams(max_tokens=4, seed=0)))[0]) == 4


async def test_a_closed_engine_refuses_and_closing_twice_is_harmless() -> None:
    engine = LocalEngine(llama(), eos_token_ids=(), max_batch_size=1)
    sampling = SamplingParams(max_tokens=20, seed=0)
    waiting = asyncio.create_task(engine.generate([5], num_completions=3, sampling=sampling))
    await _decoding_has_begun(engine)
    update = asyncio.create_task(engine.update_weights(PolicyWeights(llama(), 1)))
    await asyncio.sleep(0)
    await engine.aclose()
    await engine.aclose()
    for call in (waiting, update):
        with pytest.raises(RuntimeError, match="closed"):
            await call
    with pytest.raises(RuntimeError, match="closed"):
        await engine.generate([5], num_completions=1, sampling=sampling)


async def test_a_caller_that_gives_up_does_not_hold_up_the_others(make_engine: MakeEngine) -> None:
    engine = make_engine(llama(), eos=(), max_batch_size=2)
    sampling = SamplingParams(max_tokens=6, seed=0)
    given_up = asyncio.create_task(engine.generate([5, 6], num_completions=4, sampling=sampling))
    staying = asyncio.create_task(engine.generate([5, 6, 7], num_completions=4, sampling=sampling))
    await _decoding_has_begun(engine)
    given_up.cancel()
    assert len(await staying) == 4
    with pytest.raises(asyncio.CancelledError):
        await given_up


async def test_a_folders_generation_config_does_not_override_the_request(tmp_path: Path) -> None:
    model = llama()
    expected = await _greedy(LocalEngine(model, eos_token_ids=EOS))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.eos_token_id = list(EOS)
    model.save_pretrained(tmp_path)
    loaded = LocalEngine.from_pretrained(tmp_path, eos_token_ids=EOS)
    assert await _greedy(loaded) == expected


async def _greedy(engine: LocalEngine) -> list[list[int]]:
    groups = await draw(engine, SamplingParams(temperature=0, max_tokens=10), n=1)
    await engine.aclose()
    return [completion.token_ids for (completion,) in groups]

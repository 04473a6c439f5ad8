"""fp32 masters behind a bf16 model: small steps are kept, gradients add up in fp32, checkpoints hold the masters."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ludic.train import master_weights
from ludic.train.master_weights import MasterWeights, cast_parameters


def small_model(*, tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def backward(model: Qwen2ForCausalLM, seed: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randint(64, (2, 12))
    model(tokens, labels=tokens, use_cache=False).loss.float().backward()


def test_steps_too_small_for_bf16_add_up_in_the_masters() -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        masters.parameters[0].fill_(1.0)
        masters.publish()
        for _ in range(100):
            masters.parameters[0].add_(1e-4)
            masters.publish()
    assert model.weight.dtype == torch.bfloat16
    assert model.weight[0, 0].item() == pytest.approx(1.01, abs=0.004)
    rounded = torch.ones((), dtype=torch.bfloat16)
    for _ in range(100):
        rounded = rounded + 1e-4
    assert rounded.item() == 1.0, "bf16 alone would have lost every step"


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradients_of_micro_batches_add_up_in_fp32_and_the_models_own_are_freed(tied: bool) -> None:
    model = small_model(tied=tied)
    reference = small_model(tied=tied)
    cast_parameters(reference, torch.bfloat16)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    expected = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in reference.parameters()]
    for seed in range(3):
        backward(model, seed)
        backward(reference, seed)
        for total, parameter in zip(expected, reference.parameters(), strict=True):
            assert parameter.grad is not None
            total += parameter.grad.float()
            parameter.grad = None
    assert all(parameter.grad is None for parameter in model.parameters())
    for master, total in zip(masters.parameters, expected, strict=True):
        assert master.grad is not None and master.grad.dtype == torch.float32
        torch.testing.assert_close(master.grad, total, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_dict_is_that_of_the_model_with_masters(tied: bool) -> None:
    model = small_model(tied=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = MasterWeights(model, compute_dtype=torch.bfloat16).state_dict(model)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) and state[name].dtype == torch.float32 for name in before)


def test_in_fp32_the_parameters_are_their_own_masters() -> None:
    model = small_model()
    own = list(model.parameters())
    masters = MasterWeights(model, compute_dtype=torch.float32)
    backward(model, 0)
    assert all(master is parameter for master, parameter in zip(masters.parameters, own, strict=True))
    assert all(master.grad is not None for master in masters.parameters)
    masters.publish()


def test_a_policy_in_bf16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is not float32"):
        MasterWeights(small_model().bfloat16(), compute_dtype=torch.bfloat16)


def test_rounding_the_parameters_leaves_the_rotary_frequencies_alone() -> None:
    model = small_model()
    cast_parameters(model, torch.bfloat16)
    buffers = dict(model.named_buffers())
    assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers.values())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_frozen_parameter_stays_frozen() -> None:
    model = small_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    backward(model, 0)
    assert masters.parameters[0].grad is None and not masters.parameters[0].requires_grad
    assert all(master.grad is not None for master in masters.parameters[1:])


# --- what a step changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [2**26, 10])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_publishing_counts_the_weights_that_are_others_once_they_are_rounded(
    compute_dtype: torch.dtype, bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(master_weights, "_BUCKET", bucket)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    masters = MasterWeights(model, compute_dtype=compute_dtype)
    assert masters.num_trained == 16 + 8 + 2
    assert masters.publish().changed.item() == 0
    with torch.no_grad():
        masters.parameters[0][1, :3] += 0.01  # the next number after 1 in bf16 is 1.0078
        masters.parameters[0][2] += 0.001
        masters.parameters[2][0] = -1.0
    published = masters.publish()
    assert published.changed.item() == 4 and published.finite.item()
    assert masters.publish().changed.item() == 0


def test_steps_that_are_lost_in_rounding_change_nothing_until_they_add_up() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        masters.parameters[0].fill_(1.0)
        masters.publish()
        changed = []
        for _ in range(10):
            masters.parameters[0].add_(0.001)
            changed.append(int(masters.publish().changed))
    assert changed == [0, 0, 0, 64, 0, 0, 0, 0, 0, 0]  # half of 0.0078 is passed with the fourth


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_publishing_says_whether_the_weights_are_finite(compute_dtype: torch.dtype, value: float) -> None:
    model = small_model()
    masters = MasterWeights(model, compute_dtype=compute_dtype)
    assert masters.publish().finite.item()
    with torch.no_grad():
        masters.parameters[3].view(-1)[5] = value
    published = masters.publish()
    assert not published.finite.item()


def test_a_frozen_parameter_is_not_counted_among_those_that_could_change() -> None:
    model = small_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    total = sum(parameter.numel() for parameter in model.parameters())
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    assert masters.num_trained == total - model.model.embed_tokens.weight.numel()
    frozen = MasterWeights(torch.nn.Linear(2, 2).requires_grad_(False), compute_dtype=torch.bfloat16)
    assert frozen.num_trained == 0 and frozen.publish().changed.item() == 0 and frozen.publish().finite.item()

"""The supervised training before GRPO: what it trains on, its loss, and what it leaves behind."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ludic import GRPOConfig, Learner, warm_start
from ludic.task.prompts import encode_prompt, load_tokenizer
from ludic.train.master_weights import MasterWeights
from ludic.train.packing import pack
from ludic.train.warm_start import supervised_samples
from ludic.types import ChatMessage

Example = tuple[list[ChatMessage], str]
EXAMPLES: list[Example] = [
    ([{"role": "user", "content": f"What is {a} + {b}?"}], f"{a} + {b} = {a + b}" + "!" * (a % 4))
    for a in range(3, 9)
    for b in range(2, 4)
]


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model_dir)


def fresh(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def train(folder: Path, tokenizer: PreTrainedTokenizerBase, **given: object) -> tuple[PreTrainedModel, list[float]]:
    model = fresh(folder)
    settings = {"max_seq_len": 96, "steps": 2, "batch_size": 4, "learning_rate": 1e-3, **given}
    return model, warm_start(model, tokenizer, EXAMPLES, **settings)  # type: ignore[arg-type]


def theirs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    """transformers' loss of a padded batch, -100 where there is nothing to learn."""
    prompts = [encode_prompt(tokenizer, messages) for messages, _ in examples]
    answers = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for _, text in examples]
    pairs = list(zip(prompts, answers, strict=True))
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    padding = [width - len(prompt) - len(answer) for prompt, answer in pairs]
    ids = [[*prompt, *answer, *[0] * rest] for (prompt, answer), rest in zip(pairs, padding, strict=True)]
    labels = [[*[-100] * len(p), *answer, *[-100] * rest] for (p, answer), rest in zip(pairs, padding, strict=True)]
    mask = [[1] * (width - rest) + [0] * rest for rest in padding]
    with torch.no_grad():
        tensors = {
            name: torch.tensor(rows)
            for name, rows in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        }
        return float(model(**tensors).loss)


def test_only_the_completion_and_its_stop_token_get_gradient(tokenizer: PreTrainedTokenizerBase) -> None:
    for (messages, text), sample in zip(EXAMPLES, supervised_samples(tokenizer, EXAMPLES, max_seq_len=96), strict=True):
        trained = [token for token, mask in zip(sample.token_ids, sample.loss_mask, strict=True) if mask]
        assert sample.token_ids == [*encode_prompt(tokenizer, messages), *trained]
        assert tokenizer.decode(trained[:-1]) == text and trained[-1] == tokenizer.eos_token_id


def test_tokens_of_the_prompt_have_no_weight_in_the_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = supervised_samples(tokenizer, EXAMPLES, max_seq_len=96)
    (row,) = pack(samples, token_budget=4096, normalisation="token_mean", share_prompts=False)
    assert row.num_loss_tokens == sum(sum(sample.loss_mask) for sample in samples)
    assert not row.loss_weights[~row.loss_mask].any() and float(row.loss_weights.sum()) == pytest.approx(1)


def test_the_loss_is_that_of_transformers_own(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    _, losses = train(tiny_model_dir, tokenizer, steps=1, batch_size=len(EXAMPLES))
    assert losses[0] == pytest.approx(theirs(fresh(tiny_model_dir), tokenizer, EXAMPLES), abs=1e-5)


def test_the_cut_into_micro_batches_changes_neither_the_losses_nor_the_weights(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, losses = train(tiny_model_dir, tokenizer, steps=3, batch_size=12, micro_token_budget=4096)
    cut, again = train(tiny_model_dir, tokenizer, steps=3, batch_size=12, micro_token_budget=96)
    assert again == pytest.approx(losses, abs=1e-5)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_weights_and_another_one_another_order(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first, again, other = (train(tiny_model_dir, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert first[1] == again[1] != other[1]
    assert all(map(torch.equal, first[0].parameters(), again[0].parameters()))


def test_the_policy_learns_to_give_the_answers(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    told: list[tuple[int, float]] = []
    _, losses = train(
        tiny_model_dir,
        tokenizer,
        steps=40,
        batch_size=12,
        learning_rate=1e-2,
        on_step=lambda *figures: told.append(figures),
    )
    assert losses[-1] < 0.5 * losses[0] and told == list(enumerate(losses, start=1))


def test_a_number_of_seconds_ends_the_training(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    _, losses = train(tiny_model_dir, tokenizer, steps=None, seconds=0.2)
    assert losses


def test_the_model_is_float32_afterwards_answers_by_itself_and_can_be_trained_on(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, losses = train(tiny_model_dir, tokenizer, steps=8, batch_size=12, learning_rate=1e-2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert theirs(model, tokenizer, EXAMPLES) < losses[0]  # with the attention that it was loaded with
    learner = Learner(GRPOConfig(max_seq_len=96, micro_token_budget=640), model)
    learner.accumulate(supervised_samples(tokenizer, EXAMPLES, max_seq_len=96))
    assert learner.step(learning_rate=1e-3)["grad_norm"] > 0


def test_masters_are_given_back_and_gradients_reach_the_model_again(tiny_model_dir: Path) -> None:
    model = fresh(tiny_model_dir)
    masters = MasterWeights(model, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        masters.parameters[0].add_(1e-5)  # less than bf16 can show
    masters.release()
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter, master in zip(model.parameters(), masters.parameters, strict=True):
        assert torch.equal(parameter, master) and parameter.grad is not None and master.grad is None


def test_a_prompt_and_completion_beyond_the_limit_are_said_with_their_place_and_lengths(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, messages = fresh(tiny_model_dir), EXAMPLES[0][0]
    with pytest.raises(
        ValueError, match=r"example 1 has \d+ prompt and 301 completion tokens, more than max_seq_len 96"
    ):
        warm_start(model, tokenizer, [EXAMPLES[0], (messages, "7" * 300)], max_seq_len=96, steps=1)


@pytest.mark.parametrize("length", [{}, {"steps": 0}, {"steps": 2, "seconds": 2.0}, {"seconds": -1.0}])
def test_steps_or_seconds_are_given_and_not_both(
    length: dict[str, float], tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="steps or seconds, one of them and above 0"):
        train(tiny_model_dir, tokenizer, **{"steps": None, **length})


def test_no_examples_are_an_error(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="there are no examples"):
        warm_start(fresh(tiny_model_dir), tokenizer, [], max_seq_len=96, steps=1)


def test_a_loss_that_is_not_finite_ends_it_at_once(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FloatingPointError, match=r"update \d+ of the warm start"):
        train(tiny_model_dir, tokenizer, steps=30, learning_rate=1e30)

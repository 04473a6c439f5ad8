"""docs/grpo.md: its formulas are run, over numbers drawn here, against the functions that stand beside them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from ludic.config import GRPOConfig
from ludic.rollout.overlong import overlong_reward
from ludic.train.advantages import BatchStd, group_advantages
from ludic.train.attention import prepare_packed_attention
from ludic.train.learner import Learner
from ludic.train.logprobs import TokenStats, token_logprobs
from ludic.train.loss_inputs import LossSettings, loss_inputs
from ludic.train.losses import LOSSES
from ludic.train.packing import pack
from ludic.train.prompt_source import PromptRecord, chance
from ludic.train.schedule import schedule_factor
from ludic.types import MicroBatch, TrainingSample

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "grpo.md").read_text(encoding="utf-8")
Array = NDArray[np.float64]
FUNCTIONS = ("clip", "cos", "exp", "log", "maximum", "mean", "minimum", "pi", "sqrt", "std", "sum", "where")
NUMPY = {name: getattr(np, name) for name in FUNCTIONS}


def formulas(section: str) -> list[str]:
    """The blocks of formulas under a heading."""
    _, found, rest = PAGE.partition(f"\n## {section}\n")
    assert found, section
    return re.findall(r"```python\n(.*?)```", rest.split("\n## ", 1)[0], flags=re.DOTALL)


def worked_out(block: str, **given: Any) -> dict[str, Any]:
    """What a block assigns, from the names that it is given."""
    names = {**NUMPY, **given}
    exec(block, {"__builtins__": {}}, names)
    return names


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Three completions of 2, 5 and 3 tokens, and one micro-batch that holds them."""

    lengths: tuple[int, ...]
    advantages: tuple[float, ...]
    logprob: Array
    old: Array
    rollout: Array
    ref: Array
    row: MicroBatch

    def cut(self, values: Array) -> list[Array]:
        """[M] by completions."""
        return np.split(values, np.cumsum(self.lengths)[:-1])


def drawn(loss: str) -> Drawn:
    rng = np.random.default_rng(7)
    lengths, advantages = (2, 5, 3), (0.8, -1.1, 0.3)
    old = -rng.uniform(0.1, 3.0, sum(lengths))
    logprob, rollout, ref = (old + rng.normal(0, 0.4, len(old)) for _ in range(3))
    cut = np.split(rollout, np.cumsum(lengths)[:-1])
    samples = [
        TrainingSample(
            token_ids=[10 * index, *range(1, length + 1)],
            loss_mask=[False] + [True] * length,
            rollout_logprobs=[0.0, *known],
            advantage=advantage,
        )
        for index, (length, advantage, known) in enumerate(zip(lengths, advantages, cut, strict=True))
    ]
    (row,) = pack(samples, token_budget=32, normalisation=LOSSES[loss].normalisation, max_completion_tokens=6)
    assert row.sample_indices == (0, 1, 2)
    return Drawn(lengths, advantages, logprob, old, rollout, ref, row)


def library(loss: str, data: Drawn, settings: LossSettings) -> tuple[float, Array]:
    """The loss of the library, and its gradient with respect to the log-probs [M]."""

    def on_row(values: Array) -> torch.Tensor:
        row = torch.zeros(len(data.row.input_ids), dtype=torch.float64)
        row[data.row.target_positions] = torch.from_numpy(values)
        return row

    logprobs = on_row(data.logprob).requires_grad_()
    inputs = loss_inputs(
        TokenStats(logprobs=logprobs, entropy=torch.zeros_like(logprobs)),
        data.row,
        old_logprobs=on_row(data.old),
        ref_logprobs=on_row(data.ref),
    )
    output = LOSSES[loss].loss(dataclasses.replace(inputs, rollout_logprobs=on_row(data.rollout)), settings)
    output.loss.backward()
    assert logprobs.grad is not None
    return output.loss.item(), logprobs.grad[data.row.target_positions].numpy()


def page(loss: str, data: Drawn, logprob: Array, settings: LossSettings, *, frozen: Array | None = None) -> float:
    """The loss of the page. `frozen` holds the log-probs where the page says that there is no gradient."""
    ratio_block = formulas("The ratio")[settings.ratio_to == "sampler"]
    clipped, gspo, cispo, dual = formulas("The loss of a token")
    block = {"gspo": gspo, "cispo": cispo}.get(loss, clipped)
    (truncation, *masks), (kl_block,) = formulas("Correction for the sampler"), formulas("KL penalty")
    (divisors,), (sum_block,) = formulas("What a token's loss is divided by"), formulas("The loss of an update")
    total, rollouts, tokens = 0.0, len(data.lengths), sum(data.lengths)
    for index, length in enumerate(data.lengths):
        own: dict[str, Any] = {
            name: data.cut(values)[index] for name, values in vars(data).items() if isinstance(values, np.ndarray)
        }
        own |= {"logprob": data.cut(logprob)[index], "advantage": data.advantages[index]}
        fixed = own if frozen is None else own | {"logprob": data.cut(frozen)[index]}
        given = own | {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        if settings.ratio_to == "sampler":
            given |= {"old": own["rollout"]}
        ratio = worked_out(ratio_block, **(fixed if loss == "cispo" else own))["ratio"]
        divided = worked_out(divisors, N=rollouts, M=tokens, length=length, max_tokens=6, P=1, prompt_length=tokens)
        token_loss = worked_out(block, **given, ratio=ratio)["token_loss"] * np.ones(length)
        if settings.dual_clip and loss != "cispo":
            given |= {"dual_clip": settings.dual_clip, "token_loss": token_loss}
            token_loss = worked_out(dual, **given)["token_loss"]
        weight: Any = 1.0
        if settings.tis_cap is not None:
            weight = worked_out(truncation, **own, tis_cap=settings.tis_cap)["weight"]
        if settings.importance_mask != "none":
            band = {"mask_low": settings.mask_low, "mask_high": settings.mask_high, "weight": weight}
            weight = worked_out(masks[MASKS.index(settings.importance_mask)], **own, **band)["weight"]
        total += worked_out(
            sum_block,
            loss_weight=divided[LOSSES[loss].normalisation],
            weight=weight,
            token_loss=token_loss,
            kl=worked_out(kl_block, **own)["kl"],
            kl_coef=settings.kl_coef,
        )["loss"]
    return total


MASKS = ("token", "sequence", "geometric")


@pytest.mark.parametrize(
    "option",
    [
        {"tis_cap": 1.2},
        {"tis_cap": 1.2, "dual_clip": 1.3},
        {"ratio_to": "sampler"},
        {"importance_mask": "token", "mask_low": 0.8, "mask_high": 1.3},
        {"importance_mask": "sequence", "mask_low": 0.5, "mask_high": 1.5},
        {"importance_mask": "geometric", "mask_low": 0.85, "mask_high": 1.2, "tis_cap": 1.2},
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_page(loss: str, option: dict[str, Any]) -> None:
    data = drawn(loss)
    settings = LossSettings(clip_low=0.2, clip_high=0.25, kl_coef=0.3, **option)
    value, gradient = library(loss, data, settings)
    assert value == pytest.approx(page(loss, data, data.logprob, settings), abs=1e-6)
    for place, slope in enumerate(gradient):
        above, below = (data.logprob + sign * 1e-6 * np.eye(len(data.logprob))[place] for sign in (1, -1))
        sides = [page(loss, data, moved, settings, frozen=data.logprob) for moved in (above, below)]
        assert slope == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_advantages_are_those_of_the_page() -> None:
    reward = [0.0, 1.0, 1.0, 0.25, 0.0]
    overlong, scaled, unscaled, batch, left_out = formulas("From rewards to advantages")
    divided = worked_out(scaled, reward=np.array(reward))["scaled"]
    assert group_advantages(reward, normalise_std=True) == pytest.approx(divided.tolist())
    centred = worked_out(unscaled, reward=np.array(reward))["unscaled"]
    assert group_advantages(reward, normalise_std=False) == pytest.approx(centred.tolist())
    rloo = worked_out(left_out, reward=np.array(reward), len=len)["left_out"]
    assert group_advantages(reward, normalise_std=False, baseline="leave_one_out") == pytest.approx(rloo.tolist())
    groups = [np.array(reward), np.array([1.0, 1.0, 1.0, 1.0, 0.0])]
    every = np.concatenate([group - group.mean() for group in groups])
    batch_std = BatchStd()
    for group in groups:
        batch_std.add(group.tolist())
    expected = worked_out(batch, unscaled=centred, centred=every)["batch_scaled"]
    assert (batch_std.scale * centred).tolist() == pytest.approx(expected.tolist())
    for length in (3, 75, 83, 90):
        given = {"max_tokens": 90, "buffer": 10, "length": length}
        found = overlong_reward(length, max_tokens=90, buffer=10)
        assert found == pytest.approx(float(worked_out(overlong, **given)["overlong"]))


def test_the_prompt_mean_is_that_of_the_page() -> None:
    (divisors,) = formulas("What a token's loss is divided by")
    data = drawn("dapo")
    tokens = sum(data.lengths)
    samples = [
        TrainingSample(
            token_ids=[1, *range(2, length + 2)], loss_mask=[False] + [True] * length, rollout_logprobs=None,
            advantage=1.0, rollout=(0, member),
        )
        for member, length in enumerate(data.lengths)
    ]  # fmt: skip
    (row,) = pack(samples, token_budget=32, normalisation="prompt_mean")
    found = worked_out(divisors, N=3, M=tokens, P=1, length=2, prompt_length=tokens, max_tokens=6)["prompt_mean"]
    assert row.loss_weights[row.target_positions].tolist() == pytest.approx([found] * tokens)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.125, 0.5, 0.75, 1.0])
def test_the_chance_of_a_prompt_is_that_of_the_page(p: float) -> None:
    (block,) = formulas("Which prompts")
    record = PromptRecord(visits=1, solve_rate=p)
    assert chance(record, GRPOConfig(curriculum=True)) == pytest.approx(worked_out(block, p=p)["taken"])


def tiny_policy() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


SAMPLE = TrainingSample(
    token_ids=[5, 6, 7, 8, 9], loss_mask=[False, False, True, True, True], rollout_logprobs=None, advantage=1.0
)


@torch.no_grad()
def test_log_probs_are_those_of_the_page() -> None:
    model = tiny_policy()
    logits = model(torch.tensor([SAMPLE.token_ids])).logits[0].double().numpy()
    prepare_packed_attention(model)
    (row,) = pack([SAMPLE], token_budget=8, normalisation="token_mean")
    computed = token_logprobs(model, row, temperature=0.7).logprobs

    def softmax(values: Array) -> Array:
        return np.asarray(np.exp(values) / np.exp(values).sum())

    (block,) = formulas("Log-probabilities")
    for place in (2, 3, 4):
        given = {"logits": logits[place - 1], "token": SAMPLE.token_ids[place], "temperature": 0.7, "softmax": softmax}
        assert computed[place].item() == pytest.approx(worked_out(block, **given)["logprob"], abs=1e-5)
    assert computed[:2].tolist() == [0.0, 0.0]


def test_clipping_decay_and_adam_are_those_of_the_page() -> None:
    config = GRPOConfig(
        max_seq_len=16, micro_token_budget=16, learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.5, compile=False
    )
    learner = Learner(config, tiny_policy())
    clip, adam = formulas("From the gradient to the weights")[:2]
    names, masters = learner.masters.names, learner.masters.parameters
    state: dict[str, tuple[Any, Any]] = {name: (0.0, 0.0) for name in names}
    for step in (1, 2):
        learner.accumulate([SAMPLE])
        assert all(master.grad is not None for master in masters)
        scale = 1 / 3  # the update has three loss tokens
        raw = {n: p.grad.double().numpy() * scale for n, p in zip(names, masters, strict=True) if p.grad is not None}
        before = {name: master.detach().double().numpy() for name, master in zip(names, masters, strict=True)}
        norm = np.sqrt(sum((gradient**2).sum() for gradient in raw.values()))
        assert norm > config.max_grad_norm  # else the clip does nothing
        learner.step(learning_rate=config.learning_rate)
        for name, master in zip(names, masters, strict=True):
            clipped = worked_out(clip, gradient=raw[name], norm=norm, max_grad_norm=config.max_grad_norm)["gradient"]
            decayed = master.dim() > 1
            done = worked_out(
                adam,
                m=state[name][0],
                v=state[name][1],
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                gradient=clipped,
                master=before[name],
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay if decayed else 0.0,
                step=step,
            )
            state[name] = done["m"], done["v"]
            np.testing.assert_allclose(master.detach().numpy(), done["master"], rtol=1e-4, atol=2e-6)


def test_schedules_are_those_of_the_page() -> None:
    block = formulas("From the gradient to the weights")[2]
    sizes = {"warmup_steps": 4, "train_steps": 20}
    for step in range(20):
        said = worked_out(block, step=step, **sizes)
        for name in ("linear", "cosine"):
            factor = schedule_factor(GRPOConfig(lr_schedule=name, **sizes), step)  # type: ignore[arg-type]
            assert factor == pytest.approx(said["warmup" if step < 4 else name])
        assert schedule_factor(GRPOConfig(**sizes), step) == pytest.approx(said["warmup"] if step < 4 else 1.0)  # type: ignore[arg-type]


def test_the_clips_and_divisors_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([\d.]+) \| ([\d.]+) \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
    found = {name: (float(low), float(high), divisor) for name, low, high, divisor in rows}
    assert found == {name: (spec.clip_low, spec.clip_high, spec.normalisation) for name, spec in LOSSES.items()}


def test_every_formula_of_the_page_is_run_here() -> None:
    ran = re.findall(r"\"([A-Z][^\"]+)\"", "".join(re.findall(r"formulas\(([^)]*)\)", Path(__file__).read_text())))
    headings = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    assert {heading for heading in headings if formulas(heading)} == set(ran)


def test_every_function_that_the_page_names_is_in_the_file_that_it_links() -> None:
    text = re.sub(r"\s+", " ", PAGE)
    named = re.findall(r"`(\w+)`(?: and `(\w+)`)?(?: has them)? ?(?:\([^)]*\) )?in \[[\w.]+\]\(\.\./([^)]+)\)", text)
    assert len(named) >= 15
    for *functions, path in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        for function in filter(None, functions):
            assert re.search(rf"((def|class) {function}\b|^{function}\b.* = )", source, flags=re.MULTILINE), (
                function,
                path,
            )

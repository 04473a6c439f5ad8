"""A LoRA adapter over a frozen base: what is trained, what is sampled with, what is kept, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ludic.config import GRPOConfig
from ludic.inference.weights.sync_probe import trainer_logprobs
from ludic.inference.weights.weight_transport import WireWeights
from ludic.survival.changed_settings import changed_settings
from ludic.train import lora
from ludic.train.attention import prepare_packed_attention
from ludic.train.checkpoint import CheckpointError, latest_checkpoint, verify_checkpoint
from ludic.train.learner import Learner
from ludic.train.lora import Adapter, base_fingerprint, check_checkpoint, target_names
from ludic.train.master_weights import MasterWeights
from ludic.train.token_budget import OutOfMemory
from ludic.types import TrainingSample
from tests.test_trainer import Run, load
from tests.vllm_helpers import make_tiny_model

CONFIG = GRPOConfig(
    lora_rank=4, lora_alpha=8.0, max_seq_len=32, max_completion_len=20, rollouts_per_update=4, group_size=2
)
PROBE = [5, 17, 101, 33, 64, 250, 7]
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_tiny_model(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture
def base(base_dir: Path) -> PreTrainedModel:
    return load(base_dir)


def samples(count: int = 4) -> list[TrainingSample]:
    return [
        TrainingSample(
            token_ids=[3, 4, *range(10 + member, 20 + member)],
            loss_mask=[False] * 2 + [True] * 10,
            rollout_logprobs=None,
            advantage=1.0 if member % 2 else -1.0,
        )
        for member in range(count)
    ]


def train(learner: Learner, updates: int = 2) -> dict[str, float]:
    figures: dict[str, float] = {}
    for _ in range(updates):
        learner.accumulate(samples())
        figures = learner.step(learning_rate=1e-2)
    return figures


def logprobs(model: PreTrainedModel) -> torch.Tensor:
    return trainer_logprobs(model, PROBE, fp32_head=False)


def untouched(folder: Path) -> PreTrainedModel:
    model = load(folder)
    prepare_packed_attention(model)
    return model


# --- what is trained --------------------------------------------------------------------------------------------------


def test_a_run_begins_with_the_base_bit_for_bit(base: PreTrainedModel, base_dir: Path) -> None:
    learner = Learner(CONFIG, base)
    assert torch.equal(logprobs(base), logprobs(untouched(base_dir)))
    with learner.whole_model() as whole:
        given, original = whole.state_dict(), load(base_dir).state_dict()
    assert given.keys() == original.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in original.items())


def test_only_the_adapter_is_trained_and_only_it_has_optimizer_state(base: PreTrainedModel) -> None:
    learner = Learner(CONFIG, base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    figures = train(learner)
    changed = {name for name, tensor in base.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    assert len(changed) == 2 * 2 * len(LAYERS)  # A and B in both decoder layers
    trained = sum(before[name].numel() for name in changed)
    assert learner.masters.num_trained == trained == sum(s["exp_avg"].numel() for s in learner.optimizer.state.values())
    assert figures["changed_weights_share"] > 0.5
    assert learner.adapter is not None and f"{trained:,} weights are trained" in learner.adapter.summary


def test_what_is_sent_computes_what_is_trained(base: PreTrainedModel, base_dir: Path) -> None:
    learner = Learner(CONFIG, base)
    train(learner)
    with learner.whole_model() as whole:
        assert (logprobs(whole) - logprobs(base)).abs().max() < 1e-5
    assert (logprobs(base) - logprobs(untouched(base_dir))).abs().max() > 1e-2


def test_a_server_is_sent_the_tensors_of_the_base_by_their_names(base: PreTrainedModel, base_dir: Path) -> None:
    wanted = WireWeights(model=load(base_dir), dtype=torch.float32).shapes()
    learner = Learner(CONFIG, base)
    with learner.whole_model() as whole:
        assert WireWeights(model=whole, dtype=torch.float32).shapes() == wanted


def test_after_a_reader_the_base_is_the_base_again_also_where_it_failed(base: PreTrainedModel, base_dir: Path) -> None:
    learner = Learner(CONFIG, base)
    train(learner)
    assert learner.adapter is not None
    with pytest.raises(RuntimeError), learner.whole_model():
        raise RuntimeError("a server that was lost")
    assert torch.equal(logprobs(learner.adapter.plain), logprobs(untouched(base_dir)))


def test_no_room_to_merge_is_one_line_and_leaves_the_base(
    base: PreTrainedModel, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(CONFIG, base)
    train(learner)
    assert learner.adapter is not None
    original, calls = torch.addmm, iter(range(100))

    def full(*tensors: Any, **settings: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        return original(*tensors, **settings)

    monkeypatch.setattr(torch, "addmm", full)
    with pytest.raises(OutOfMemory, match="when the adapter was merged") as caught, learner.whole_model():
        pass
    assert "\n" not in str(caught.value)
    assert torch.equal(logprobs(learner.adapter.plain), logprobs(untouched(base_dir)))


def test_the_base_lies_in_memory_once_and_in_the_dtype_that_computes(base: PreTrainedModel) -> None:
    adapter = Adapter(base, CONFIG, compute_dtype=torch.bfloat16)
    masters = MasterWeights(base, compute_dtype=torch.bfloat16)
    named = dict(zip(masters.names, masters.parameters, strict=True))
    assert all(named[name].dtype == (torch.float32 if ".lora_" in name else torch.bfloat16) for name in named)
    in_use = {parameter.data_ptr() for parameter in base.parameters()}
    frozen = {master.data_ptr() for name, master in named.items() if ".lora_" not in name}
    assert frozen < in_use and {parameter.data_ptr() for parameter in adapter.plain.parameters()} <= in_use


def test_a_base_that_comes_in_bf16_is_trained_over_as_it_is(base: PreTrainedModel) -> None:
    base.bfloat16()
    adapter = Adapter(base, CONFIG, compute_dtype=torch.bfloat16)
    masters = MasterWeights(base, compute_dtype=torch.bfloat16)
    trained = [master for master in masters.parameters if master.requires_grad]
    assert len(trained) == 2 * 2 * len(LAYERS) and all(master.dtype == torch.float32 for master in trained)
    assert {parameter.dtype for parameter in [*base.parameters(), *adapter.plain.parameters()]} == {torch.bfloat16}


def test_in_bf16_the_sum_is_made_of_float32_masters_and_rounded_once(base: PreTrainedModel) -> None:
    adapter = Adapter(base, CONFIG, compute_dtype=torch.bfloat16)
    masters = MasterWeights(base, compute_dtype=torch.bfloat16)
    named = dict(zip(masters.names, masters.parameters, strict=True))
    adapter.use(named)
    layer = "model.layers.1.mlp.down_proj"
    a, b = (named[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(0))
    masters.publish()
    wanted = (named[f"{layer}.base_layer.weight"].double() + 8 / 4 * b.double() @ a.double()).float().to(torch.bfloat16)
    with adapter.merged() as merged:
        given = merged.get_parameter(f"{layer}.weight")
        assert given.dtype == torch.bfloat16
        assert torch.ne(given, wanted).float().mean() < 1e-3  # but for ties that double precision breaks otherwise


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_the_gradient_does_not_depend_on_the_cut_or_on_recomputing(base_dir: Path, recomputed: bool) -> None:
    def gradient(**settings: Any) -> torch.Tensor:
        learner = Learner(dataclasses.replace(CONFIG, **settings), load(base_dir))
        train(learner, updates=1)  # B is no longer 0, so that A has a gradient too
        learner.accumulate(samples(8))
        return torch.cat([one.grad.flatten() for one in learner.masters.parameters if one.grad is not None])

    whole = gradient(micro_token_budget=1024)
    assert whole.abs().max() > 1e-2
    cut = gradient(micro_token_budget=32, gradient_checkpointing=recomputed, share_prompts=False)
    assert (whole - cut).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))


def test_layers_with_an_adapter_are_compiled_whole(base_dir: Path) -> None:
    def gradients(model: PreTrainedModel, *, compiled: bool) -> torch.Tensor:
        learner = Learner(CONFIG, model)
        for layer in model.model.layers if compiled else ():
            # A break in the graph is an error. The MLP alone: attention on the CPU depends on the lengths in a row.
            layer.mlp.compile(dynamic=True, fullgraph=True, backend="eager")
        train(learner, updates=1)
        learner.accumulate(samples())
        return torch.cat([one.grad.flatten() for one in learner.masters.parameters if one.grad is not None])

    eager, compiled = (gradients(load(base_dir), compiled=compiled) for compiled in (False, True))
    assert torch.allclose(eager, compiled, atol=1e-6)


def test_the_reference_is_the_base_without_a_second_model(base: PreTrainedModel, base_dir: Path) -> None:
    config = dataclasses.replace(CONFIG, kl_coef=0.1)
    learner = Learner(config, base)
    first = train(learner, updates=1)["kl_ref"]
    assert first == 0.0 and train(learner)["kl_ref"] > 1e-4
    assert learner.adapter is not None and learner._reference is learner.adapter.plain
    assert torch.equal(logprobs(learner.adapter.plain), logprobs(untouched(base_dir)))
    with pytest.raises(ValueError, match="only if, kl_coef is above 0 and lora_rank is 0"):
        Learner(config, load(base_dir), reference_model=load(base_dir))


def test_the_start_is_the_seeds_alone(base_dir: Path) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        model = load(base_dir)
        Adapter(model, dataclasses.replace(CONFIG, seed=seed), compute_dtype=torch.float32)
        return {name: tensor for name, tensor in model.state_dict().items() if ".lora_A." in name}

    torch.manual_seed(1)
    one, drawn = start(0), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # nothing was taken from the process's generator
    torch.manual_seed(2)
    again, other = start(0), start(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


# --- whole runs and their checkpoints ---------------------------------------------------------------------------------

LORA: dict[str, Any] = {"lora_rank": 4, "learning_rate": 3e-2, "logprob_share": 1.0}


@pytest.fixture
def loads_the_base(monkeypatch: pytest.MonkeyPatch, digit_policy_dir: Path) -> None:
    monkeypatch.setattr("tests.test_trainer.masters_folder", lambda checkpoint: digit_policy_dir)


@pytest.fixture(scope="module")
def ten_updates(digit_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(digit_policy_dir, tmp_path_factory.mktemp("ten"), train_steps=10, **LORA)
    run.go()
    return run


def test_the_adapter_learns_what_is_rewarded(ten_updates: Run) -> None:
    rewards = [row["reward_mean"] for row in ten_updates.logger.updates()]
    assert sum(rewards[:3]) / 3 < 0.3 and sum(rewards[-3:]) / 3 > 0.8


def test_every_update_trains_the_policy_that_sampled(ten_updates: Run) -> None:
    gaps = [row["logprob_gap"] for row in ten_updates.logger.updates() if row["trained_sequences"]]
    assert len(gaps) > 3 and max(gaps) < 1e-4


@pytest.mark.usefixtures("loads_the_base")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_updates_and_two_after_a_resume_are_four_updates(
    digit_policy_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"eval_every": 2, "model_dtype": dtype, **LORA}
    whole = Run(digit_policy_dir, tmp_path / "whole", train_steps=4, **options)
    whole.go()
    Run(digit_policy_dir, tmp_path / "parts", train_steps=2, **options).go()
    torch.manual_seed(999)
    second = Run(digit_policy_dir, tmp_path / "parts", train_steps=4, resume=True, **options)
    second.go()
    assert second.logger.updates() == whole.logger.updates()[2:]
    assert second.rollouts() == whole.rollouts()
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_checkpoint_is_a_whole_model_with_the_adapter_beside_it(ten_updates: Run, digit_policy_dir: Path) -> None:
    checkpoint = latest_checkpoint(ten_updates.paths.checkpoints)
    assert checkpoint is not None
    verify_checkpoint(checkpoint)
    files = {path.name for path in (checkpoint / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert not (checkpoint / "training" / "masters").exists()
    merged = untouched(checkpoint)
    assert (logprobs(merged) - logprobs(ten_updates.model)).abs().max() < 1e-5


def test_peft_loads_the_adapter_over_the_base(ten_updates: Run, digit_policy_dir: Path) -> None:
    checkpoint = latest_checkpoint(ten_updates.paths.checkpoints)
    assert checkpoint is not None
    ids = torch.tensor([PROBE])
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(load(digit_policy_dir), str(checkpoint / "adapter"))(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(checkpoint)(ids).logits
        base = load(digit_policy_dir)(ids).logits
    assert (theirs - ours).abs().max() < 1e-4 < 1e-1 < (theirs - base).abs().max()
    settings = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == LAYERS and settings["r"] == 4 and settings["inference_mode"]


def test_a_damaged_adapter_is_found_by_the_manifest(ten_updates: Run, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(ten_updates.paths.checkpoints)
    assert checkpoint is not None
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        verify_checkpoint(copy)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(base: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder with the adapter of a learner after two updates."""
    learner = Learner(CONFIG, base)
    train(learner)
    assert learner.adapter is not None
    learner.adapter.save(tmp_path)
    return tmp_path


def test_an_adapter_goes_on_over_its_own_base(checkpoint: Path, base: PreTrainedModel, base_dir: Path) -> None:
    resumed = load(base_dir)
    Learner(CONFIG, resumed, checkpoint=checkpoint)
    assert torch.equal(logprobs(resumed), logprobs(base))


def test_an_adapter_of_another_base_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", tie_word_embeddings=True, seed=1)
    with pytest.raises(
        CheckpointError, match=r"^\S+adapter was trained over other weights than those of \S*"
    ) as caught:
        Learner(CONFIG, other, checkpoint=checkpoint)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_of_a_base_is_that_of_its_bf16_copy_and_one_changed_weight_changes_it(
    base: PreTrainedModel,
) -> None:
    base.bfloat16()
    fingerprint = base_fingerprint(base)
    assert base_fingerprint(base.float()) == fingerprint
    with torch.no_grad():
        base.get_parameter("model.norm.weight")[0] += 1
    assert base_fingerprint(base) != fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 8}, "--lora-rank is 8, and .* was made with 4: pass --lora-rank 4"),
        ({"lora_alpha": 16.0}, "--lora-alpha is 16, and .* was made with 8: pass --lora-alpha 8"),
        ({"lora_target": "q_proj"}, "--lora-target is q_proj, and .* has an adapter of down_proj,gate_proj"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    checkpoint: Path, base_dir: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Learner(dataclasses.replace(CONFIG, **settings), load(base_dir), checkpoint=checkpoint)


def test_an_adapter_that_lacks_a_tensor_or_has_one_too_many_is_refused(checkpoint: Path, base_dir: Path) -> None:
    path = checkpoint / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    metadata = {"base": base_fingerprint(load(base_dir))}
    save_file({**tensors, "more": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="it has no more"):
        Learner(CONFIG, load(base_dir), checkpoint=checkpoint)
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"{first} is missing or of another shape"):
        Learner(CONFIG, load(base_dir), checkpoint=checkpoint)


def test_a_checkpoint_of_the_other_kind_is_refused_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    check_checkpoint(checkpoint, CONFIG)
    with pytest.raises(CheckpointError, match="is of a training with an adapter: pass --lora-rank 4"):
        check_checkpoint(checkpoint, dataclasses.replace(CONFIG, lora_rank=0))
    (tmp_path / "whole").mkdir()
    with pytest.raises(
        CheckpointError, match="has no adapter: leave out --lora-rank 4, or start a new run with --model"
    ):
        check_checkpoint(tmp_path / "whole", CONFIG)


def test_settings_of_an_adapter_have_changed_only_where_there_is_one() -> None:
    before_there_were_any: dict[str, Any] = {"loss": "grpo"}
    without = {"lora_rank": 0, "lora_alpha": 16.0, "lora_target": "q_proj", **before_there_were_any}
    assert changed_settings(before_there_were_any, without) == []
    assert changed_settings(without, {**without, "lora_alpha": 32.0}) == []
    assert changed_settings({**without, "lora_rank": 4}, {**without, "lora_rank": 8}) == ["--lora-rank was 4, is 8"]
    merged = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "lora_sync"}
    assert changed_settings(merged, {**merged, "lora_sync": "merged"}) == []
    assert changed_settings(merged, {**merged, "lora_sync": "adapter"}) == [
        "--lora-sync is adapter, the checkpoint was made without it"
    ]


def test_the_layers_of_an_adapter_are_named_and_the_output_layer_is_not_among_them(base: PreTrainedModel) -> None:
    assert target_names(base, "all-linear") == LAYERS
    assert target_names(base, "v_proj, q_proj") == ["q_proj", "v_proj"]
    for name in ("lm_head", "q_prj", "embed_tokens"):
        with pytest.raises(
            ValueError, match=f"has no linear layers called '{name}' .*: choose of down_proj, .*v_proj, or"
        ):
            target_names(base, name)


def test_without_peft_the_flag_says_what_to_install(monkeypatch: pytest.MonkeyPatch, base: PreTrainedModel) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--lora-rank needs peft, which is not installed: run `uv sync --extra lora`"):
        Learner(CONFIG, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": -1}, "--lora-rank must not be negative, but is -1"),
        ({"lora_alpha": 0.0}, "--lora-alpha must be above 0, not 0"),
        ({"lora_target": "q_proj,"}, "--lora-target 'q_proj,' has an empty name"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)

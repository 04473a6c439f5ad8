"""Arithmetic for larger models: exact where it counts, and within 20% of what was measured where it predicts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._functorch import config as functorch_config
from transformers import AutoConfig, AutoModelForCausalLM

from ludic.capacity.__main__ import main
from ludic.capacity.measured import BUDGETS, DECODING, Check, checks
from ludic.capacity.memory import (
    ACTIVATIONS,
    GIB,
    MERGED,
    WHOLE_COPY,
    Trainer,
    head_work,
    host_bytes,
    sync_parts,
    training_parts,
)
from ludic.capacity.pace import BETWEEN_HOSTS, Machine, Work, rows_of, sync_bytes, sync_seconds, training_seconds
from ludic.capacity.plan import Plan, best_layout, estimate, largest_budget
from ludic.capacity.shapes import NAMED, read_shape, shape_of
from ludic.config import GRPOConfig
from ludic.train.attention import ACTIVATION_BUDGET
from ludic.train.rank_learner import check_settings
from scripts import write_docs

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 300,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama with biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "llama of wide heads": {"model_type": "llama", "head_dim": 64, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": False},
    "qwen3 with biases": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True, "tie_word_embeddings": True},
}
CONFIGS = {**NAMED, **{name: {**SMALL, **config} for name, config in FAMILIES.items()}}


def built(config: dict[str, Any]) -> torch.nn.Module:
    """transformers' own model of this config, without memory for its weights."""
    settings = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings)
        )
    return model


# -- exact counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_exactly_those_of_transformers_model(name: str) -> None:
    model = built(CONFIGS[name])
    shape = shape_of(CONFIGS[name], name)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    layer = model.get_submodule("model.layers.0")
    assert shape.layer_parameters == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("name", ["0.5B", "llama of wide heads", "qwen3"])
def test_the_adapters_parameters_are_exactly_pefts(name: str) -> None:
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(built(CONFIGS[name]), settings)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert shape_of(CONFIGS[name], name).adapter_parameters(8) == trained


def kept_bytes(config: dict[str, Any], tokens: int) -> float:
    """Bytes of a token that a compiled layer saves for its backward pass, counted on the CPU."""
    torch._dynamo.reset()
    settings = {name: value for name, value in config.items() if name != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **settings)
    made._attn_implementation = "sdpa"
    layer = AutoModelForCausalLM.from_config(made).model.layers[0].to(torch.bfloat16).eval()
    head_dim = layer.self_attn.head_dim
    rotary = (
        torch.randn(1, tokens, head_dim, dtype=torch.bfloat16),
        torch.randn(1, tokens, head_dim, dtype=torch.bfloat16),
    )
    hidden = torch.randn(1, tokens, config["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    not_its_own = {tensor.untyped_storage().data_ptr() for tensor in (*rotary, *layer.parameters())}
    saved: list[torch.Tensor] = []  # all kept, so that no storage is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    with (
        functorch_config.patch(activation_memory_budget=ACTIVATION_BUDGET),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        compiled(hidden, position_embeddings=rotary)  # type: ignore[no-untyped-call, unused-ignore]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for place, size in storages.items() if place not in not_its_own) / tokens


@pytest.mark.parametrize("name", ["qwen2, tied", "llama of wide heads", "qwen3"])
def test_a_compiled_layer_keeps_exactly_the_activations_that_are_counted(name: str) -> None:
    assert kept_bytes(CONFIGS[name], 256) == shape_of(CONFIGS[name], name).activation_bytes


# -- against what was measured ------------------------------------------------------------------------------------------------

CHECKS = checks()
MISSED = {
    "training of an update, 0.5B, packed, compiled, prompts shared",
    "the sync after it",
    "a sync under load, 0.5B",
}
"""Said so in docs/capacity.md."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_a_prediction_is_within_20_percent_of_what_was_measured_or_named_as_missed(check: Check) -> None:
    assert (abs(check.predicted / check.measured - 1) <= 0.2) == (check.what not in MISSED)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_a_measured_figure_stands_in_the_results_or_has_date_machine_and_command(check: Check) -> None:
    if check.source in (BUDGETS, DECODING):
        assert re.match(r"2026-\d\d-\d\d, \d x NVIDIA \w+, .+: .+", check.source)
        return
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    lines = [line for line in results.splitlines() if line.startswith(check.source)]
    assert lines and any(re.search(rf"(?<![\d.]){check.measured:g}(?![\d.])", line) for line in lines)


def test_the_peaks_by_token_budget_are_predicted_within_5_percent() -> None:
    peaks = {check.what: check.error for check in CHECKS if check.what.startswith("peak of training, 0.5B, budget")}
    assert len(peaks) == 5 and max(map(abs, peaks.values())) < 0.05


# -- memory --------------------------------------------------------------------------------------------------------------------

STATE = ("masters, fp32", "AdamW's moments, fp32", "gradients, fp32", "copies, bf16", WHOLE_COPY)
ALL_7B = 7_615_616_512
"""Parameters of 7B; `shapes` is held against transformers' own model above."""


def page(name: str) -> str:
    """A document, with its line breaks as spaces."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def test_a_trained_parameter_costs_the_bytes_that_the_page_states() -> None:
    stated = (
        "12 / N bytes for the fp32 master and AdamW's moments, 2 / N for the bf16 copy, 4 for the fp32 gradient, and on GPU 0 "
        "2 more for the whole copy if N > 1"
    )
    assert stated in page("capacity.md")
    one, eight = (training_parts(read_shape("7B"), Trainer(gpus=gpus)) for gpus in (1, 8))
    assert sum(one[name] for name in STATE) == 137_081_097_216  # 18 bytes
    assert sum(eight[name] for name in STATE) == 59_021_027_968  # 12 / 8 + 2 / 8 + 4 + 2 = 7.75 bytes


def test_with_cpu_offload_a_gpu_keeps_the_whole_copy_alone_and_the_hosts_hold_the_rest() -> None:
    shape, trainer = read_shape("7B"), Trainer(gpus=8, cpu_offload=True)
    parts = training_parts(shape, trainer)
    assert {name: parts[name] for name in STATE if parts[name]} == {WHOLE_COPY: 15_231_233_024}
    assert host_bytes(shape, trainer) == (30_462_466_048, 17_135_137_152, 91_387_398_144)  # 4, 18 / 8 and 12 bytes


def test_with_lora_the_base_costs_2_bytes_and_the_adapter_18() -> None:
    assert "| Qwen2.5-7B | 2,523,136 (0.03%) | 40,370,176 (0.53%) |" in page("lora.md")
    parts = training_parts(read_shape("7B"), Trainer(lora_rank=16))
    assert parts["frozen base, bf16"] == 15_231_233_024
    assert sum(parts[name] for name in STATE) == 726_663_168  # 18 x 40,370,176


def test_a_sync_with_lora_needs_the_adapted_layers_twice_and_may_be_the_worst_moment() -> None:
    assert "the adapted layers have a second copy in W's dtype on the trainer's device" in page("lora.md")
    parts = sync_parts(read_shape("7B"), Trainer(lora_rank=16))
    # 28 layers of 233,046,016 weights in bf16, and the largest, 18,944 x 3,584, twice in fp32
    assert parts[MERGED] == 13_050_576_896 + 543_162_368
    assert parts["gradients, fp32"] == 0 and "activations" not in {name for name, size in parts.items() if size}
    worst = training_parts(read_shape("32B"), Trainer(lora_rank=16, checkpointing=True, row=2048))
    assert worst[MERGED] > 0
    assert largest_budget(read_shape("32B"), Trainer(lora_rank=16, checkpointing=True), 80) == 0


def test_a_frozen_output_layer_has_no_gradient() -> None:
    shape = read_shape("7B")
    saved = head_work(shape, Trainer()) - head_work(shape, Trainer(lora_rank=16))
    assert saved == 4 * 152_064 * 3_584


def test_with_gradient_checkpointing_a_layer_keeps_its_input_alone() -> None:
    shape = read_shape("32B")
    parts = training_parts(shape, Trainer(row=1000, checkpointing=True))
    assert parts[ACTIVATIONS] == 64 * 2 * 5120 * 1000


def test_the_last_gradients_of_fsdp_may_be_the_worst_moment_and_have_no_activations_beside_them() -> None:
    parts = training_parts(read_shape("70B"), Trainer(gpus=64, row=1024, checkpointing=True, cpu_offload=True))
    assert parts[ACTIVATIONS] == 0
    # of 2 x 128,256 x 8,192 + 8,192 weights 2 bytes in bf16, 4 in fp32 and a 64th of 4
    assert parts["gradients, bf16, on their way"] == 12_739_461_632


def test_gradients_are_whole_on_every_gpu_unless_every_micro_batch_reduces_them_to_the_hosts() -> None:
    shape = read_shape("70B")
    once, each = (training_parts(shape, Trainer(gpus=16, row=1, cpu_offload=offload)) for offload in (False, True))
    assert once["gradients, fp32"] == 282_214_825_984  # 4 x 70,553,706,496
    assert each["gradients, fp32"] == 0


def test_the_largest_budget_fits_and_the_next_one_does_not() -> None:
    shape, trainer = read_shape("7B"), Trainer(lora_rank=16)
    assert largest_budget(shape, trainer, 80) == 16384
    usable = 80 * 0.99 * 0.95 * GIB
    assert sum(training_parts(shape, trainer).values()) <= usable
    assert sum(training_parts(shape, replace(trainer, row=32768)).values()) > usable
    assert largest_budget(shape, trainer, 80, least=32768) == 0


def test_two_gpus_share_masters_and_gather_embedding_output_layer_and_two_layers() -> None:
    two = training_parts(read_shape("7B"), Trainer(gpus=2, checkpointing=True))
    assert two["masters, fp32"] == 15_231_233_024  # 4 x 7,615,616,512 / 2
    assert two["gathered layers, bf16"] == 2 * (1_089_998_336 + 2 * 233_057_792)
    assert training_parts(read_shape("7B"), Trainer())["gathered layers, bf16"] == 0


# -- plans ---------------------------------------------------------------------------------------------------------------------


def plan(model: str = "70B", *, memory: float = 141, work: Work | None = None, **trainer: Any) -> Plan:
    return Plan(
        shape=read_shape(model),
        trainer=Trainer(**trainer),
        machine=Machine(gpu_memory=memory, link=BETWEEN_HOSTS),
        work=work or Work(),
    )


def test_70b_fits_no_gpus_of_141_gb_and_the_page_says_what_it_would_need_if_the_trainer_changed() -> None:
    trainers: tuple[dict[str, Any], ...] = (
        {"gpus": 16}, {"gpus": 64}, {"gpus": 16, "cpu_offload": True}, {"gpus": 64, "cpu_offload": True}, {"lora_rank": 16}
    )  # fmt: skip
    for trainer in trainers:
        found = estimate(plan(checkpointing=True, row=2048, **trainer))
        assert not found.trainer_fits and found.limit == "memory of the trainer"
    parts = estimate(plan(gpus=16, checkpointing=True, cpu_offload=True)).parts
    without_copy = (sum(parts.values()) - 2 * 70_553_706_496) / GIB
    said = page("capacity.md")
    assert f"With `--cpu-offload` GPU 0 would then need {without_copy:.1f} GiB" in said
    reduced = without_copy + 18 * 70_553_706_496 / 16 / GIB
    assert f"With both changes 16 GPUs would need {reduced:.1f} GiB each without offload, and fit 141 GB" in said
    assert reduced < 141 * 0.99 * 0.95


def test_7b_fits_4_gpus_of_80_gb_and_32b_fits_8_of_141_gb_with_offload_alone() -> None:
    assert estimate(plan("7B", gpus=4, checkpointing=True, memory=80, row=4096)).trainer_fits
    assert estimate(plan("32B", gpus=8, checkpointing=True, cpu_offload=True)).trainer_fits
    assert not estimate(plan("32B", gpus=8, checkpointing=True, row=2048)).trainer_fits


def test_a_server_takes_as_few_gpus_as_hold_its_rollouts() -> None:
    few, many = (estimate(plan(work=Work(rollouts=rollouts, longest=4096))) for rollouts in (16, 512))
    assert (few.tensor_parallel, few.in_flight) == (2, 16)
    assert (many.tensor_parallel, many.in_flight) == (8, 512)
    assert estimate(plan(memory=16)).limit == "memory of the trainer"
    assert not estimate(plan(memory=16)).server_fits


def test_the_longest_part_of_an_update_is_what_limits_it() -> None:
    assert estimate(plan("0.5B")).limit == "decode"
    assert estimate(plan("7B", checkpointing=True, lora_rank=16)).limit == "training"
    slow = replace(plan("0.5B"), machine=Machine(link=1e8))
    assert estimate(slow).limit == "sync"


def test_the_best_layout_uses_the_gpus_that_are_left_and_the_largest_micro_batches_that_fit() -> None:
    offloaded = plan("32B", gpus=16, checkpointing=True, cpu_offload=True, work=Work(rollouts=512))
    found = best_layout(offloaded, gpus=32)
    assert found is not None and found.trainer_fits
    assert (found.gpus, found.plan.servers, found.plan.trainer.row) == (32, 2, 32768)
    assert best_layout(plan(gpus=32), gpus=32) is None  # nothing is left to serve


def test_rows_are_as_few_as_the_budget_allows_and_evenly_filled() -> None:
    work = Work(rollouts=256, prompt=100, completion=100, longest=100, share_prompts=False)
    assert rows_of(work, Trainer(row=16384)) == (4, 12800)
    assert rows_of(work, Trainer(row=16384, gpus=4)) == (1, 12800)


def test_ranks_send_gradients_once_an_update_and_with_offload_in_every_micro_batch() -> None:
    said = page("capacity.md")
    assert "by one empty row more at the end of an update, with `--cpu-offload` in every micro-batch" in said
    assert "Several GPUs without `--cpu-offload` are counted as FSDP2 that adds gradients up once an update" in said
    shape, work, slow = read_shape("7B"), Work(), Machine(link=1e8)
    assert rows_of(work, Trainer(gpus=2))[0] == 5  # 131,200 tokens for two
    # GB at 0.1 GB/s: half of 7.615616512 x 4 for both gathers of a row, x 8 for a row that also reduces in fp32
    once, each = (
        training_seconds(shape, slow, work, Trainer(gpus=2, cpu_offload=offload)) for offload in (False, True)
    )
    assert once == pytest.approx(5 * 152.31 + 304.62, rel=0.01)
    assert each == pytest.approx(6 * 304.62, rel=0.01)


def test_the_weights_are_gathered_on_gpu_0_once_a_sync() -> None:
    slow = Machine(link=1e9)
    one, four = (sync_seconds(read_shape("7B"), slow, Trainer(gpus=gpus)) for gpus in (1, 4))
    assert four - one == pytest.approx(11.423, abs=0.001)  # three quarters of 15.231 GB


def test_a_sync_and_a_checkpoint_with_lora_are_of_the_whole_model_with_the_adapter_merged_in() -> None:
    said = page("lora.md")
    assert "**The server** gets a whole model" in said and "a whole model, with the adapter merged in" in said
    shape = read_shape("1.5B")
    assert sync_bytes(shape) == 2 * 1_543_714_304
    slow = Machine(memory_rate=1e9)
    merging = sync_seconds(shape, slow, Trainer(lora_rank=32)) - sync_seconds(shape, slow, Trainer())
    assert merging == pytest.approx(26.204, abs=0.001)  # 20 bytes of 28 x 46,792,704 weights
    found = estimate(plan("7B", lora_rank=16))
    assert found.checkpoint_bytes == 2 * ALL_7B + 12 * 40_370_176


# -- the command ---------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_as_the_name_of_its_shape_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("qwen2", **{k: v for k, v in NAMED["1.5B"].items() if k != "model_type"}).save_pretrained(
        tmp_path
    )
    assert replace(read_shape(str(tmp_path)), name="1.5B") == read_shape("1.5B")
    assert main(["--model", str(tmp_path)]) == 0
    assert "1,543,714,304 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "13B"], "--model 13B: take one of 0.5B, 1.5B, 7B, 32B, 70B, or a folder with config.json"),
        (["--servers", "0"], "--servers 0: it must be at least 1"),
        (["--link", "0"], "--link 0.0: it must be above 0"),
        (["--mfu", "48"], "--mfu 48.0: it is a fraction, at most 1"),
        (["--completion-tokens", "2000"], "--completion-tokens 2000 is above --longest 1024: raise --longest"),
        (["--longest", "20000"], "--micro-token-budget 16384 does not hold a sequence of 20100 tokens"),
        (
            ["--lora-rank", "16", "--training-gpus", "4"],
            "--lora-rank 16 is for one training GPU: leave out --training-gpus 4",
        ),
        (["lora", "--training-gpus", "4"], "--lora-rank 16 is for one training GPU: leave out --training-gpus 4"),
        (
            ["layouts", "--lora-rank", "16"],
            "--lora-rank 16 is for one training GPU, and layouts has more: leave it out",
        ),
        (["--cpu-offload"], "--cpu-offload is for several training GPUs: add --training-gpus, or leave it out"),
        (["--tensor-parallel", "4"], "--tensor-parallel 4 does not divide the 14 heads of 0.5B: take a divisor"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "mixtral"}', "parameters of model_type 'mixtral' are not counted"),
        ('{"model_type": "qwen2", "quantization_config": {"bits": 4}}', "is quantised"),
        ('{"model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 2}', "has no intermediate_size"),
        ("[]", "holds no object"),
        ("{", "is no JSON"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_shape(str(tmp_path))


def test_the_trainer_refuses_an_adapter_on_several_gpus_too() -> None:
    with pytest.raises(ValueError, match="--lora-rank 16 is for one process"):
        check_settings(GRPOConfig(lora_rank=16), 4)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--model", "7B", "--gpu-memory", "80"], "Take --gradient-checkpointing --training-gpus 8."),
        (["--model", "32B"], "Take --gradient-checkpointing --training-gpus 8 --cpu-offload."),
        (["--model", "70B"], "Neither --gradient-checkpointing, 8 --training-gpus, --cpu-offload nor --lora-rank 16 makes it"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_names_the_first_flags_that_would(
    flags: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    assert advice in capsys.readouterr().out


def test_the_page_is_what_its_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    printed = re.findall(
        r"```bash\nuv run python -m ludic\.capacity ([^\n]+)\n```\n.*?<!-- ([\w-]+):begin -->\n(.*?)\n<!-- \2:end -->",
        page,
        re.DOTALL,
    )
    assert {part for _, part, _ in printed} == set(write_docs.CAPACITY)
    for flags, _, text in printed:
        assert main(flags.split()) == 0
        assert capsys.readouterr().out == text + "\n"


def test_the_page_names_every_prediction_that_missed() -> None:
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if "**missed**" in line]
    assert {line.split("|")[1].strip() for line in lines} == MISSED

"""A folder with something other than a whole model in full precision: one true line in each program, and nothing is loaded.

transformers loads an adapter onto the model where peft is installed, and leaves it out where it is not; neither says so.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoConfig

from ludic.doctor.__main__ import main as doctor
from ludic.task.hub import cache_without_hub
from ludic.task.pretrained import UnusableModelError, load_config, load_full_config, load_model
from tests.conftest import write_digit_problems
from tests.vllm_helpers import make_tiny_model, make_tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples" / "gsm8k"


def adapter_beside(model: Path) -> None:
    """As peft writes it."""
    settings = {"peft_type": "LORA", "base_model_name_or_path": "acme/base-7b", "r": 8, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    (model / "adapter_model.safetensors").write_bytes(b"")


def adapter_alone(model: Path) -> None:
    adapter_beside(model)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (model / file).unlink(missing_ok=True)


def adapter_that_names_no_base(model: Path) -> None:
    adapter_alone(model)
    (model / "adapter_config.json").write_text("{")


def quantised(settings: Any, key: str = "quantization_config") -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, key: settings}))

    return change


CHANGES = [
    pytest.param(adapter_alone, "is an adapter of acme/base-7b (adapter_config.json) and no whole model: merge it",
                 id="adapter alone"),
    pytest.param(adapter_that_names_no_base, "is an adapter (adapter_config.json) and no whole model: merge it",
                 id="adapter with broken settings"),
    pytest.param(adapter_beside, "holds an adapter of acme/base-7b (adapter_config.json) beside a whole model",
                 id="adapter beside a model"),
    pytest.param(quantised({"quant_method": "gptq", "bits": 4, "group_size": 128}),
                 "are quantised (quantization_config in config.json: gptq)", id="gptq"),
    pytest.param(quantised({"quant_method": "bitsandbytes", "load_in_4bit": True}),
                 "are quantised (quantization_config in config.json: bitsandbytes)", id="bitsandbytes"),
    pytest.param(quantised({"format": "int-quantized"}, "compression_config"),
                 "are quantised (compression_config in config.json)", id="old compressed-tensors"),
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    make_tiny_model(folder, tie_word_embeddings=True)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights, data or a tokenizer were read")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", read)
    monkeypatch.setattr("environments.gsm8k.load", read)


def program(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("change", "said"), CHANGES)
async def test_training_refuses_it_in_one_line_also_without_checks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], said: str
) -> None:
    change(model)
    script = program("train_gsm8k", monkeypatch)
    words = ["--engine", "local", "--model", str(model), "--dataset", str(tmp_path), "--out-dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["train_gsm8k.py", *words, "--no-checks"])
    with pytest.raises(UnusableModelError) as caught:  # a ValueError, which `run_script` ends with 2
        await script.main()
    assert said in str(caught.value) and "\n" not in str(caught.value) and "give" in str(caught.value)


@pytest.mark.parametrize(("change", "said"), CHANGES)
async def test_an_evaluation_refuses_it_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], said: str
) -> None:
    change(model)
    script = program("eval_gsm8k_vllm", monkeypatch)
    words = ["--engine", "local", "--model", str(model), "--dataset", str(tmp_path), "--out-dir", str(tmp_path / "out")]
    with pytest.raises(UnusableModelError) as caught:
        await script.run(script.build_parser().parse_args(words))
    assert said in str(caught.value)


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_the_doctor_says_it_once_and_ends_with_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], said: str
) -> None:
    change(model)
    write_digit_problems(tmp_path / "train.jsonl", 4)
    words = ["--engine", "local", "--model", str(model), "--dataset", str(tmp_path), "--out-dir", str(tmp_path)]
    assert doctor(words) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and said in printed.err and said not in printed.out


def test_quantised_weights_have_a_configuration_for_a_server_that_serves_them(model: Path) -> None:
    quantised({"quant_method": "fp8"})(model)
    assert load_config(model).vocab_size == load_config(str(model)).vocab_size
    with pytest.raises(UnusableModelError, match="a vLLM server can evaluate them as they are"):
        load_full_config(model)


def test_a_quantised_text_part_of_a_model_that_also_sees_is_found(model: Path) -> None:
    composite = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 16, "quantization_config": {"quant_method": "awq"}},
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    (model / "config.json").write_text(json.dumps(composite))
    assert AutoConfig.from_pretrained(model).get_text_config().quantization_config
    with pytest.raises(UnusableModelError, match="awq"):
        load_full_config(model)


def test_an_adapter_is_not_loaded_onto_the_model_beside_it(model: Path) -> None:
    adapter_beside(model)
    with pytest.raises(UnusableModelError, match="which of the two is meant is not known"):
        load_model(model)


def test_an_adapter_in_the_hubs_cache_is_said_to_be_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_alone(model)
    commit = tmp_path / "hub" / "models--acme--tuned" / "snapshots" / ("0" * 40)
    shutil.copytree(model, commit)
    (commit.parent.parent / "refs").mkdir()
    (commit.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache_without_hub(["acme/tuned"], dataset=None, say=print)
    with pytest.raises(UnusableModelError, match=r"acme/tuned is an adapter of acme/base-7b"):
        load_config("acme/tuned")

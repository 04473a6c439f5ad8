"""The list of what ludic touches of vLLM is whole, the installed vLLM fits it, and the checker sees what would not.

`scripts/check_vllm_contract.py` holds the other supported versions against the same list.
"""

import ast
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.peers import vllm_nccl
from ludic.inference.server.server_defaults import DEFAULTS
from ludic.inference.server.server_help import VLLM_RANGE
from ludic.inference.weights.weight_transport import WireWeights
from ludic.inference.worker import vllm_logprobs
from tests.vllm_contract import ALWAYS, EITHER
from tests.vllm_sources import ROOT, Sources, imported, listed, problems

CALLERS = sorted(path for folder in ("src", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
_DOTTED = re.compile(r"(vllm(?:\.[a-z_0-9]+)+)(?:\.([A-Z]\w*))?")


@cache
def installed_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("no vLLM is installed")
    return Path(spec.origin).parent.parent


@cache
def installed_text(path: str) -> str | None:
    file = installed_folder() / path
    return file.read_text(encoding="utf-8") if file.is_file() else None


def installed_but(path: str, old: str, new: str) -> Callable[[str], str | None]:
    """The installed vLLM's files, one of them changed."""

    def read(wanted: str) -> str | None:
        text = installed_text(wanted)
        if wanted != path:
            return text
        assert text is not None and old in text, f"the test is out of date: {path} has no {old!r}"
        return text.replace(old, new)

    return read


def test_the_installed_vllm_fits_and_is_not_imported() -> None:
    before = set(sys.modules)
    assert problems(Sources(installed_text)) == []
    assert not {name for name in set(sys.modules) - before if name.startswith("vllm.")}


@pytest.mark.parametrize(
    ("path", "old", "new", "said"),
    [
        ("vllm/inputs/engine.py", "def tokens_input(", "def token_input(", "no tokens_input in vllm.inputs.engine"),
        ("vllm/inputs/engine.py", "cache_salt", "salt", "got an unexpected keyword argument 'cache_salt'"),
        ("vllm/distributed/utils.py", "def create(", "def make(", "no create in StatelessProcessGroup"),
        ("vllm/distributed/utils.py", "store_timeout", "timeout_s", "unexpected keyword argument 'store_timeout'"),
        ("vllm/sampling_params.py", "    flat_logprobs: bool", "    flat: bool", "'flat_logprobs'"),
        ("vllm/sampling_params.py", "FINAL_ONLY", "LAST_ONLY", "no FINAL_ONLY in RequestOutputKind"),
        ("vllm/v1/worker/gpu/input_batch.py", "prefill_len_np", "prefill_len", "no prefill_len_np in InputBatch"),
        ("vllm/v1/worker/gpu_model_runner.py", "self.optimistic_seq_lens_cpu", "self.lens", "no optimistic_seq_lens_cpu"),
        ("vllm/model_executor/layers/utils.py", ".cpu_linear", ".linear", "assigns no cpu_linear"),
        ("vllm/entrypoints/serve/dev/rpc/api_router.py", "/collective_rpc", "/rpc", "no text '/collective_rpc'"),
        ("vllm/v1/worker/gpu_worker.py", "without a matching", "before", "no text 'without a matching' in Worker"),
        ("vllm/platforms/interface.py", "def is_cuda_alike(self)", "def is_cuda_like(self)", "no is_cuda_alike in Platform"),
        (
            "vllm/distributed/device_communicators/pynccl.py",
            "        device: int | str | torch.device,\n",
            "        device: int | str | torch.device,\n        stream: object,\n",
            "missing a required argument: 'stream'",
        ),
        (
            "vllm/distributed/weight_transfer/base.py",
            "    @abstractmethod\n    def shutdown(self)",
            "    @abstractmethod\n    def abort(self) -> None: ...\n\n    @abstractmethod\n    def shutdown(self)",
            "SharedMemoryWeightTransferEngine lacks abort, abstract in WeightTransferEngine",
        ),
        (
            "vllm/distributed/weight_transfer/nccl_engine.py",
            "class NCCLTrainerInitInfo(",
            "class TrainerInfo(",
            "none of: vllm.distributed.weight_transfer",
        ),
    ],
)  # fmt: skip
def test_what_a_version_has_lost_or_renamed_is_named(path: str, old: str, new: str, said: str) -> None:
    found = problems(Sources(installed_but(path, old, new)))
    assert any(said in line for line in found), found


def test_a_module_that_is_gone_is_named() -> None:
    def read(path: str) -> str | None:
        return None if path == "vllm/distributed/weight_transfer/factory.py" else installed_text(path)

    assert problems(Sources(read)) == ["no module vllm.distributed.weight_transfer.factory"]


def test_a_method_that_became_a_property_does_not_pass_for_a_call() -> None:
    files = {"vllm/a.py": "class A:\n    @property\n    def metadata(self): ...\n    def whole(self): ...\n"}
    sources = Sources(files.get)
    sources.check("vllm.a", "A.metadata")
    sources.check("vllm.a", "A.whole()")
    with pytest.raises(Exception, match="metadata is a property"):
        sources.check("vllm.a", "A.metadata()")


@pytest.mark.parametrize("path", CALLERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_that_is_imported_from_vllm_is_in_the_list(path: Path) -> None:
    text, known = path.read_text(encoding="utf-8"), listed()
    wanted = imported(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if match := _DOTTED.fullmatch(node.value):  # a name that is compared, or run by `python -m`
                wanted.add((match[1], match[2] or ""))
            elif node.value.startswith("\nimport vllm"):  # a program for another process
                wanted |= imported(node.value)
    wanted.discard(("vllm.platform_plugins", ""))  # a group of entry points, not a module
    for module, name in wanted:
        is_listed = f"{module}.{name}" in known or (module in known and (not name or name in known[module]))
        assert is_listed, f"{module}: {name} is not in tests/vllm_contract.py"


def test_names_that_are_looked_up_as_strings_are_in_the_list() -> None:
    uses = {
        use for one in (ALWAYS, *(one for some in EITHER for one in some)) for names in one.values() for use in names
    }
    assert {f"GPUModelRunner.{name}" for name in vllm_logprobs._USED_V1} <= uses
    assert {f"InputBatch.{name}" for name in vllm_logprobs._USED_V2} <= uses
    flags = {row.dest for row in DEFAULTS if row.dest}
    assert {flag for flag in flags if f"AsyncEngineArgs.{flag}" not in uses} <= {
        use.removeprefix("FrontendArgs.") for use in uses
    }


def test_the_range_of_versions_is_the_same_wherever_it_stands() -> None:
    (low, first), (high, last) = VLLM_RANGE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (wanted,) = [one for one in project["project"]["optional-dependencies"]["examples"] if one.startswith("vllm")]
    assert wanted.startswith(f"vllm>={low}.{first},<{high}.{last + 1};")
    texts = [ROOT / "docs" / "server.md", ROOT / "CHANGELOG.md", *CALLERS]
    spans = [span for text in texts for span in re.findall(r"0\.26 to 0\.\d+", text.read_text(encoding="utf-8"))]
    assert len(spans) > 3 and set(spans) == {f"{low}.{first} to {high}.{last}"}


# --- the peer that no test can run without two GPUs -----------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.28", "0.33"])
def test_the_trainers_weights_are_read_as_each_version_reads_them(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    class Iterated: ...

    class Declared:
        def __init_subclass__(cls) -> None:
            assert hasattr(vars(cls)["metadata"], "__set_name__"), "metadata must be a cached property"

        def iter_full(self) -> Any:
            raise NotImplementedError

    base = ModuleType("vllm.distributed.weight_transfer.base")
    base.WeightSource = Iterated if version == "0.28" else Declared  # type: ignore[attr-defined]
    base.ParamMeta = lambda *args: args  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)

    model: Any = torch.nn.Linear(2, 3, bias=False)
    source = vllm_nccl._weight_source(WireWeights(model=model, dtype=torch.bfloat16))
    described = source.metadata() if version == "0.28" else source.metadata
    tensors = iter(source) if version == "0.28" else source.iter_full()
    assert described == [("weight", torch.bfloat16, (3, 2))]
    assert [(name, tensor.dtype) for name, tensor in tensors] == [("weight", torch.bfloat16)]
    if version == "0.33":
        assert source.metadata is source.metadata

"""LoRA (arXiv 2106.09685): a small adapter is trained over a base that stays as it is.

A linear layer with the frozen weight W computes W x + s B A x, with A [r, in], B [out, r] and s = alpha / r. The layers are
peft's, put into the model in place; A and B have float32 masters as any trained weight has, W has none, no gradient and no
optimizer state.

Beside the model stands `Adapter.plain`: the same architecture without the adapter, over the very tensors of the base. It is
the reference policy of a KL penalty at no memory. While a caller is inside `Adapter.merged`, its weights are W + s B A, summed
in float32 and rounded once: what a checkpoint serves is a whole model. So is what engines are sent and what is proven there,
and no server has to know of adapters, unless `--lora-sync adapter` sends A and B themselves.

Left out: adapters of embeddings and of the output layer, whose log-probs are computed outside of the module; and dropout, which
the sampler would not have.
"""

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ludic.config import ALL_LINEAR, GRPOConfig
from ludic.storage.manifest import CheckpointError, read_json
from ludic.train.fingerprint import bit_sums
from ludic.train.master_weights import cast_parameters
from ludic.train.token_budget import merging_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_FOLDER = "adapter"
"""Of a checkpoint: a folder as peft writes it, with the float32 masters."""
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
"""peft's name of the only adapter; it is no part of the names in files."""
_PREFIX = "base_model.model."
"""What peft puts before the names of the model's modules."""


class Adapter:
    """Puts a fresh adapter, or that of a checkpoint, into `model`, in place, and freezes everything else.

    B starts at 0 and A uniform in +-1 / sqrt(in), drawn from `config.seed` alone: the policy begins as the base.

    Args:
        model: prepared for packed attention, in float32 or `compute_dtype`; its own parameters become frozen ones in the latter.
        checkpoint: of a run with this adapter over this base, verified; None for a new run.

    Raises:
        ValueError: peft is not installed, or `model` has no such layers; one line.
        CheckpointError: the checkpoint's adapter is another one, or belongs to another base.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        config: GRPOConfig,
        *,
        compute_dtype: torch.dtype,
        checkpoint: Path | None = None,
    ) -> None:
        require_peft()
        from peft import LoraConfig, inject_adapter_in_model

        self._settings = config
        self._targets = target_names(model, config.lora_target)
        self._config = LoraConfig(
            r=config.lora_rank,
            lora_alpha=_whole(config.lora_alpha),
            target_modules=self._targets,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
        )
        self._scale = config.lora_alpha / config.lora_rank
        model.requires_grad_(False)
        cast_parameters(model, compute_dtype)
        self.plain = _sharing_copy(model)
        """The base, over the same tensors. Its weights are merged ones inside `merged` alone."""
        with torch.random.fork_rng(devices=[]):  # peft draws from the process's generator; the seeds below are ours
            inject_adapter_in_model(self._config, model, _NAME)
        self._layers = {
            name.removesuffix(".base_layer"): module.weight
            for name, module in model.named_modules()
            if name.endswith(".base_layer")
        }
        for name, weight in self._layers.items():
            # A parameter of its own, so that merging never touches what trains.
            self.plain.get_submodule(name).weight = torch.nn.Parameter(weight.data, requires_grad=False)
        self._masters: dict[str, torch.Tensor] = {
            name: one for name, one in model.named_parameters() if one.requires_grad
        }
        self._start(config.seed)
        if checkpoint is not None:
            self._load(checkpoint / ADAPTER_FOLDER)

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self._masters.items():
            parameter.data = parameter.data.float()  # peft takes the base's dtype
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            else:
                parameter.zero_()

    def use(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Merge and save these float32 tensors from now on: by name, those of the trained parameters among them."""
        self._masters = {name: masters[name] for name in self._masters}

    @property
    def summary(self) -> str:
        """One line: what is trained, and how much of the whole that is."""
        trained, whole = (
            sum(one.numel() for one in ones) for ones in (self._masters.values(), self.plain.parameters())
        )
        return (
            f"LoRA of rank {self._config.r} in {len(self._layers)} layers ({', '.join(self._targets)}): "
            f"{trained:,} weights are trained, {100 * trained / whole:.2f}% of the base's {whole:,}"
        )

    # -- the whole model -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    @torch.no_grad()
    def merged(self) -> Iterator["PreTrainedModel"]:
        """`plain` with the adapter merged in; needs a copy of the adapted layers in the base's dtype meanwhile.

        Raises:
            OutOfMemory: there is no room for it; the base is as it was.
        """
        theirs = {name: self.plain.get_submodule(name).weight for name in self._layers}
        try:
            try:
                for name, weight in self._layers.items():
                    a, b = (self._masters[f"{name}.lora_{letter}.{_NAME}.weight"] for letter in "AB")
                    whole = torch.addmm(weight.float(), b.detach(), a.detach(), alpha=self._scale)
                    theirs[name].data = whole.to(weight.dtype)
                    del whole
            except torch.OutOfMemoryError as error:
                raise merging_out_of_memory(self._settings) from error
            yield self.plain
        finally:
            for name, weight in self._layers.items():
                theirs[name].data = weight.data

    # -- on disk ---------------------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        """Write `checkpoint/adapter` as peft does, with the float32 masters; peft and vLLM load it over the base."""
        folder = checkpoint / ADAPTER_FOLDER
        folder.mkdir()
        settings = self._config.to_dict() | {"inference_mode": True}  # type: ignore[no-untyped-call]  # of peft
        text = json.dumps(settings, indent=2, sort_keys=True, default=lambda value: sorted(value))  # peft has sets
        (folder / _CONFIG_FILE).write_text(text + "\n")
        tensors = {_peft_name(name): master.detach().cpu().contiguous() for name, master in self._masters.items()}
        metadata = {"format": "pt", "base": base_fingerprint(self.plain)}
        save_file(tensors, folder / _WEIGHTS_FILE, metadata=metadata)

    def _load(self, folder: Path) -> None:
        _check_settings(read_json(folder / _CONFIG_FILE), self._config, folder)
        path = folder / _WEIGHTS_FILE
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                base = (file.metadata() or {}).get("base")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if base != (here := base_fingerprint(self.plain)):
            raise CheckpointError(
                f"{folder} was trained over other weights than those of {self._config.base_model_name_or_path} (fingerprint "
                f"{base}, here {here}): put the model back that the run began with, or start a new run"
            )
        for name, parameter in self._masters.items():
            tensor = stored.pop(_peft_name(name), None)
            if tensor is None or tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{path} does not fit this model: {_peft_name(name)} is missing or of another shape"
                )
            parameter.data.copy_(tensor)
        if stored:
            raise CheckpointError(f"{path} does not fit this model: it has no {min(stored)}")


def adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A, and B times its scale alpha / r in float32, of each layer of `model` that has an adapter, by peft's names.

    They are the tensors that `model` computes with: rounded ones on a GPU. A server that adds B A x needs no more than them.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        layer, _, letter = name.removesuffix(f".{_NAME}.weight").rpartition(".lora_")
        if letter == "A":
            tensors[_peft_name(name)] = parameter.detach()
        elif letter == "B":
            scale = cast("dict[str, float]", model.get_submodule(layer).scaling)[_NAME]
            tensors[_peft_name(name)] = parameter.detach().float() * scale
    return tensors


def base_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters below the adapter of `model`, by the names that they have without one."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{_NAME}." not in name
    }


def require_peft() -> None:
    """Raises ValueError where peft is missing, whose layers these are."""
    if find_spec("peft") is None:
        raise ValueError("--lora-rank needs peft, which is not installed: run `uv sync --extra lora`, or leave it out")


def target_names(model: "PreTrainedModel", target: str) -> list[str]:
    """The names of the linear layers that `--lora-target` means, as they are called within their blocks, sorted.

    Raises:
        ValueError: the model has no linear layers of one of these names apart from its output layer.
    """
    head = model.get_output_embeddings()
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if not there:
        raise ValueError(f"{type(model).__name__} has no linear layers for an adapter: leave out --lora-rank")
    if target == ALL_LINEAR:
        return sorted(there)
    names = {name.strip() for name in target.split(",")}
    if unknown := sorted(names - there):
        raise ValueError(
            f"--lora-target {target}: {type(model).__name__} has no linear layers called {unknown[0]!r} that an adapter can be "
            f"put into: choose of {', '.join(sorted(there))}, or {ALL_LINEAR}"
        )
    return sorted(names)


def check_checkpoint(checkpoint: Path, config: GRPOConfig) -> None:
    """Compare what a resumed run trains with what its checkpoint has, before anything is loaded.

    Raises:
        CheckpointError: one has an adapter and the other has not, or the adapters differ in size.
    """
    folder = checkpoint / ADAPTER_FOLDER
    if folder.is_dir() and not config.lora_rank:
        rank = read_json(folder / _CONFIG_FILE).get("r")
        raise CheckpointError(f"{checkpoint} is of a training with an adapter: pass --lora-rank {rank}")
    if config.lora_rank and not folder.is_dir():
        raise CheckpointError(
            f"{checkpoint} is of a training of all weights and has no adapter: leave out --lora-rank {config.lora_rank}, or "
            f"start a new run with --model {checkpoint}"
        )
    if config.lora_rank:
        stored = read_json(folder / _CONFIG_FILE)
        _check_number("--lora-rank", stored.get("r"), config.lora_rank, folder)
        _check_number("--lora-alpha", stored.get("lora_alpha"), config.lora_alpha, folder)


def base_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that tell one base from another: of each parameter the exact sum of its bits in bfloat16.

    The same on every device, and whatever the dtype that a base in bfloat16 is held in.
    """
    lines = "".join(f"{name} {number}\n" for name, number in bit_sums(model, torch.bfloat16).items())
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def _sharing_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """Another model with the very same parameters: its modules and its configuration are its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _peft_name(name: str) -> str:
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def _whole(alpha: float) -> int:
    """An int where it is one, as other readers of the file say it should be; peft itself takes any number."""
    return int(alpha) if float(alpha).is_integer() else cast("int", alpha)


def _check_settings(stored: Mapping[str, Any], ours: Any, folder: Path) -> None:
    _check_number("--lora-rank", stored.get("r"), ours.r, folder)
    _check_number("--lora-alpha", stored.get("lora_alpha"), ours.lora_alpha, folder)
    theirs, wanted = sorted(stored.get("target_modules") or ()), sorted(ours.target_modules)
    if theirs != wanted:
        raise CheckpointError(
            f"--lora-target is {','.join(wanted)}, and {folder} has an adapter of {','.join(theirs)}: pass "
            f"--lora-target {','.join(theirs)}"
        )


def _check_number(flag: str, stored: Any, given: float, folder: Path) -> None:
    if stored != given:
        raise CheckpointError(f"{flag} is {given:g}, and {folder} was made with {stored}: pass {flag} {stored}")

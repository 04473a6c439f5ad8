"""Loads a model's configuration and weights from a folder or the hub, and runs nothing that comes with them.

Three ways in which a folder's files could run code, and what becomes of each without `trust_remote_code`:
- `auto_map` in its JSON names Python files of the folder: refused where the model needs them, ignored where transformers
  knows the model itself.
- `_attn_implementation` in config.json names a repository of kernels, which transformers fetches and imports whatever
  `trust_remote_code` says: refused.
- weights in `pytorch_model.bin` are a pickle: refused with or without trust. Only safetensors are read.

Left out, and refused before anything is loaded: adapters, which transformers puts onto the model by itself where peft is
installed, and leaves out without a word where it is not; and quantised weights, which are no weights to train.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from safetensors import SafetensorError

from ludic.task.hub import looks_like_a_path

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class UnusableModelError(ValueError):
    """The folder or hub name holds something other than a whole model in full precision."""


def check_folder(name: str | os.PathLike[str]) -> None:
    """Refuse a path without a folder there, before a library that takes seconds is imported to say so.

    Raises:
        ValueError: one line.
    """
    if looks_like_a_path(os.fspath(name)) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"model folder {os.fspath(name)} does not exist: give a folder with a saved model, or a hub name"
        )


def load_config(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration of a model folder or hub name. Quantised models have one too: a server can serve them.

    Raises:
        UnusableModelError: an adapter lies there, with or without a whole model; one line.
        ValueError: there is none, it cannot be read, or it wants code to be run; one line.
    """
    check_folder(name)
    _refuse_adapter(name)
    from transformers import AutoConfig  # takes seconds

    with loading(name, "configuration"):
        config = cast("PretrainedConfig", AutoConfig.from_pretrained(place(name), trust_remote_code=trust_remote_code))
    if not trust_remote_code:
        _refuse_kernels(name, config)
    return config


def load_full_config(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """`load_config` of a model whose weights are read on this side, to train them or to decode with them.

    Raises:
        UnusableModelError: its weights are quantised; one line. Also what `load_config` raises.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    keys = ("quantization_config", "compression_config")  # the second: older files of compressed-tensors
    for part, key in itertools.product((config, config.get_text_config()), keys):
        if settings := getattr(part, key, None):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            where = f"{key} in config.json" + (f": {method}" if method else "")
            raise UnusableModelError(
                f"the weights of {os.fspath(name)} are quantised ({where}), and neither training nor --engine local reads "
                "such weights: give the model that they were made from; a vLLM server can evaluate them as they are"
            )
    return config


def load_model(
    name: str | os.PathLike[str], *, dtype: "torch.dtype | None" = None, trust_remote_code: bool = False
) -> "PreTrainedModel":
    """The causal language model in a folder or under a hub name, in `dtype`, or in that which its files say.

    Raises:
        ValueError: there is none, its weights are no safetensors, they are quantised, or it wants code to be run; one line.
    """
    from transformers import AutoModelForCausalLM

    config = load_full_config(name, trust_remote_code=trust_remote_code)
    with loading(name, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            place(name),
            config=config,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    return cast("PreTrainedModel", model)


_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
                    "audio_tokenizer_config.json")  # fmt: skip
_ADAPTER_FILE = "adapter_config.json"


def serving_files(name: str | os.PathLike[str]) -> dict[str, bytes]:
    """What a model folder or hub name has for serving beside model and tokenizer, by file name.

    The settings of processors, without which a server does not load a model that also takes images or sound; and of a folder
    its Python files, which config.json may name. They are read, never run.
    """
    paths = sorted(Path(place(name)).glob("*.py"))
    with contextlib.suppress(OSError):  # no such model: this one came from elsewhere, under a name of its own
        paths += [path for file in _PROCESSOR_FILES if (path := _file(name, file))]
    return {path.name: path.read_bytes() for path in paths}


def stored_dtype(config: "PretrainedConfig") -> "torch.dtype":
    """The dtype that a configuration names, or its text part; float32 where neither does."""
    import torch

    named = config.dtype or config.get_text_config().dtype or torch.float32
    return cast("torch.dtype", named)


@contextlib.contextmanager
def loading(name: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns what malformed files lead to, while transformers loads `what` of `name`, into one line that says what to do."""
    from huggingface_hub.errors import StrictDataclassError  # brings an HTTP client: no flag has to wait for it

    builtin = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)
    try:
        yield
    except (*builtin, SafetensorError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own: read that code, and pass --trust-remote-code if you trust it"
        elif "safetensors" in lines[0] and isinstance(error, OSError):
            reason = (
                f"{lines[0].rstrip('.')}; other formats are pickles, which can run code: load it where you trust it, and "
                "save it again with save_pretrained"
            )
        else:
            reason = lines[0]
        raise ValueError(f"no {what} could be loaded for {os.fspath(name)}: {reason}") from error


def place(name: str | os.PathLike[str]) -> str:
    """The name that transformers takes: a folder without its `~`, or the hub's."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else os.fspath(name)


def _file(name: str | os.PathLike[str], file: str) -> Path | None:
    """A file of a model folder or hub name; None where it has none. Raises OSError where there is no such model."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        place(name),
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _refuse_adapter(name: str | os.PathLike[str]) -> None:
    with loading(name, "configuration"):
        found = _file(name, _ADAPTER_FILE)
        whole = found is not None and _file(name, "config.json") is not None
    if found is None:
        return
    try:
        base = json.loads(found.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    of = f" of {base!s:.200}" if base else ""
    if whole:
        raise UnusableModelError(
            f"{os.fspath(name)} holds an adapter{of} ({_ADAPTER_FILE}) beside a whole model, and which of the two is meant is "
            f"not known: take {_ADAPTER_FILE} out for the model alone, or give a folder into which the adapter is merged "
            "(peft's merge_and_unload, then save_pretrained)"
        )
    raise UnusableModelError(
        f"{os.fspath(name)} is an adapter{of} ({_ADAPTER_FILE}) and no whole model: merge it into its base (peft's "
        "merge_and_unload, then save_pretrained), and give that folder"
    )


def _refuse_kernels(name: str | os.PathLike[str], config: "PretrainedConfig") -> None:
    """`_attn_implementation` is a word like `sdpa`, unless it names a repository to be imported."""
    for part in (config, config.get_text_config()):
        implementation = part._attn_implementation
        for one in implementation.values() if isinstance(implementation, dict) else [implementation]:
            if isinstance(one, str) and "/" in one:
                raise ValueError(
                    f"the config.json of {os.fspath(name)} asks for attention from {one!r:.80}, which is code from elsewhere: "
                    "take `_attn_implementation` out of it, or pass --trust-remote-code if you trust it"
                )

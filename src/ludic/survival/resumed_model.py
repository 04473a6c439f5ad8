"""Which model a resumed run reads its configuration and tokenizer from: the one that it began with, or its checkpoint.

The checkpoint holds weights, configuration, tokenizer and the model's own files, so a run goes on where its first model has
another name by now, or is gone. Left out: the reference of the KL term, which is that first model and in no checkpoint.
"""

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from ludic.task.hub import looks_like_a_path
from ludic.task.pretrained import load_config


class ResumedModel(NamedTuple):
    """Where a resumed run finds configuration and tokenizer."""

    files: str
    """A folder or hub name."""
    is_first: bool
    """Whether these are the model that the run began with, whose weights are the reference of the KL term."""


def find_resumed_model(
    given: str, recorded: str, checkpoint: Path, *, unreachable: bool = False, trust_remote_code: bool = False
) -> ResumedModel:
    """The model `given` if it is the one that the run began with, however it is spelt; its checkpoint where that is gone.

    Args:
        given: what --model says.
        recorded: `TrainerState.model`; earlier versions kept it as it was spelt.
        unreachable: the hub cannot be asked for `given`, and its cache has no copy.

    Raises:
        ValueError: `given` is another model; one line.
    """
    same_name = given == recorded or os.path.abspath(given) == os.path.abspath(recorded)
    if not os.path.isdir(given):
        if same_name and (unreachable or looks_like_a_path(recorded)):
            return ResumedModel(str(checkpoint), is_first=False)
        if given == recorded:
            return ResumedModel(given, is_first=True)  # on the hub
    elif same_name or (os.path.isdir(recorded) and os.path.samefile(given, recorded)):
        return ResumedModel(given, is_first=True)
    elif os.path.samefile(given, checkpoint) or (
        # It was moved, or spelt from another folder: what can still be seen is whether both have one configuration.
        not os.path.isdir(recorded)
        and _configuration(given, trust_remote_code) == _configuration(str(checkpoint), trust_remote_code)
    ):
        return ResumedModel(given, is_first=False)
    raise ValueError(f"checkpoint {checkpoint} belongs to {recorded}, not to --model {given}: pass --model {recorded}")


def keep_model(checkpoint: Path, folder: Path) -> Path:
    """The model files of `checkpoint` in `folder`, where they stay when the checkpoint makes way for later ones.

    A server that is started again loads them again. They are linked where the file system can do that.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint, folder, copy_function=link, ignore=shutil.ignore_patterns("training"))
    return folder


def _configuration(name: str, trust_remote_code: bool) -> Any:
    return _without_dtype(load_config(name, trust_remote_code=trust_remote_code).to_dict())


def _without_dtype(value: Any) -> Any:
    """What makes a model another one: not the dtype of its file, nor who wrote that."""
    if not isinstance(value, dict):
        return value
    left_out = ("dtype", "transformers_version", "_name_or_path", "use_cache")
    return {key: _without_dtype(item) for key, item in value.items() if key not in left_out}

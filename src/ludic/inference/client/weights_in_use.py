"""Which weights an evaluation scores: their owner in words, and a fingerprint to compare two passes.

A server of ours says both: its guard knows the run that sent them, and its workers digest what they hold. Of plain vLLM, and
of a model that is decoded in this process, the files' sizes, times and headers stand in, which differ where a folder was
written again; or the hub's commit.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ludic.inference.client.handshake import served_model, server_state
from ludic.inference.client.server_control import ServerControl
from ludic.rollout.errors import EngineError, ServerLostError
from ludic.storage.inert import inert


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsInUse:
    """The weights that an engine computes with, as far as it says."""

    description: str
    """For people: `update 37 of the run in /runs/a (not those of m)`."""
    fingerprint: str
    """`held` and a digest, `files` and a digest, `commit` and its hash; "" where nothing tells."""
    policy_version: int | None = None
    """The update that made them, where a run has sent them and the sync was proven."""
    out_dir: str | None = None
    """Of that run."""
    device: str | None = None
    """Where the server computes, e.g. cpu; None where it does not say."""
    is_ours: bool = False
    """Whether it is a server of ours, which takes weights."""
    from_run: bool = False
    """Whether a trainer has sent weights since the server was started."""
    max_model_len: int | None = None
    """Tokens of the server's context."""


def weights_of_server(control: ServerControl, model: str, files: str) -> WeightsInUse:
    """Ask the server that serves `model`; `files` is the folder or hub name that stands for it on this side.

    Raises:
        ServerLostError: it does not answer.
    """
    context = served_model(control, model).get("max_model_len")
    server = server_state(control)
    if not server.is_ours:
        return WeightsInUse(
            description=f"what the server serves as {model}; it does not say which they are",
            fingerprint=files_fingerprint(files),
            max_model_len=context,
        )
    try:
        fingerprint = f"held {control.weights_digest()}"
    except ServerLostError:
        raise
    except EngineError:  # an update is under way
        fingerprint = ""
    info, weights = control.server_info(), server.weights
    folder = inert(str(info.get("model", files)), 200)
    version = out_dir = None
    description = f"those of {folder}, as the server loaded them at its start"
    if weights is not None:
        out_dir = inert(str(weights["identity"].get("out_dir") or ""), 200) or None
        run = f"the run in {out_dir}" if out_dir else "a trainer that did not say where it runs"
        version = weights["policy_version"] if weights["proven"] else None
        known = (
            f"update {version} of {run}"
            if weights["proven"]
            else f"not known: {run} is replacing them, or left them so"
        )
        description = f"{known} (not those of {folder})"
    return WeightsInUse(
        description=description,
        fingerprint=fingerprint,
        policy_version=version,
        out_dir=out_dir,
        device=str(info.get("device", "")),
        is_ours=True,
        from_run=weights is not None,
        max_model_len=context,
    )


def weights_of_files(files: str) -> WeightsInUse:
    """Of an engine that has just loaded them from there."""
    return WeightsInUse(description=f"those of {files}", fingerprint=files_fingerprint(files))


def files_fingerprint(files: str) -> str:
    """Differs where the model's files in a folder were written again, or the hub's name stands for another commit."""
    folder = Path(files).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(files, "config.json")
        return f"commit {Path(found).parent.name}" if isinstance(found, str) else ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin", ".pt") or path.name == "config.json":
            about = path.stat()
            digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
            digest.update(_header(path))
    return f"files {digest.hexdigest()[:16]}"


def _header(path: Path) -> bytes:
    """What a safetensors file says of its tensors; of another file its beginning."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 2**24))

"""A checkpoint in which any of our files was changed at will (`ludic.train.checkpoint`, `manifest`, `optimizer_state`).

    scripts/fuzz.sh 10 checkpoint

An input says which file of a small, whole checkpoint is changed, and how: replaced, spliced, or a value of its JSON (for
safetensors, of its header) exchanged. `check` says what must hold and needs no fuzzer: `tests/test_properties.py` draws
inputs for it too. Left out: the model's own files beside ours, which transformers reads.
"""

import contextlib
import dataclasses
import json
import logging
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

FILES = ("training/trainer_state.json", "manifest.json", "training/optimizer.safetensors")
HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**53 + 1,
        -(2**63),
        10**400,
        0.5,
        -0.0,
        1e308,
        "",
        "\0",
        "/",
        "..",
        [],
        {},
        [[]],
    ),
    *(
        "../../out",
        "/etc/passwd",
        "\x1b]0;owned\x07",
        "\u202e",
        "\ud800",
        "x" * 300,
        "step_9",
        "F64",
        "I64",
        [-1],
        [2**62, 4],
    ),
    *([0, 2**62], {"step": 1}, {"size": 0, "sha256": "0" * 64}, "exp_avg.weight", '["weight"]', "[[[[", [0, 64]),
)
SEEDS = (
    *(b"\x00\x00{}", b"\x01\x01\x00\x10\x02zz", b"\x02\x02\x00\x01\x03", b"\x03\x02\x01\x00\x15"),
    *(b"\x03\x01\x00\x00\x08\xff\xff", b'\x03\x00\x10\x00\x00\x00\x00\x00\x00\x00{"a":{}}       ', b"\x00\x02\x03\x14"),
    *(b"\x02\x00[[[[[[[[", b"\x01\x00" + b"[" * 3000),
)


class Sandbox:
    """A whole checkpoint of a model with one layer, whose files are changed and put back."""

    def __init__(self, folder: Path) -> None:
        import torch

        from ludic.storage.manifest import write_manifest
        from ludic.train.checkpoint import TrainerState
        from ludic.train.optimizer_state import save_optimizer

        self.checkpoint = folder / "step_3"
        training = self.checkpoint / "training"
        training.mkdir(parents=True, exist_ok=True)
        self.model = torch.nn.Linear(4, 4)
        optimizer = self.optimizer()
        self.model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        figures = {"step": 3, "num_problems": 8, "accuracy": 0.5, "accuracy_ci95": [0.1, 0.9], "strict_accuracy": 0.5}
        figures |= {"parse_err_rate": 0.0, "truncation_rate": 0.0, "avg_completion_length": 7.5}
        state = TrainerState(
            step=3,
            policy_version=3,
            model="m",
            config={"learning_rate": 1e-6},
            evaluations=[figures],
            wandb_run_id="a1",
        )
        (self.checkpoint / FILES[0]).write_text(json.dumps(dataclasses.asdict(state)))
        save_optimizer(training, optimizer, [name for name, _ in self.model.named_parameters()])
        write_manifest(self.checkpoint)
        self.whole = {name: (self.checkpoint / name).read_bytes() for name in FILES}

    def optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW(self.model.parameters(), lr=1e-3)


def changed(data: bytes, whole: dict[str, bytes]) -> tuple[str, bytes]:
    """Which file an input changes, and its new bytes."""
    name, how, rest = FILES[(data[:1] or b"\0")[0] % len(FILES)], (data[1:2] or b"\0")[0] % 3, data[2:]
    before = whole[name]
    if how == 0:
        return name, rest
    if how == 1:
        place, gone = int.from_bytes(rest[:2], "big") % (len(before) + 1), (rest[2:3] or b"\0")[0]
        return name, before[:place] + rest[3:] + before[place + gone :]
    if not name.endswith(".safetensors"):
        return name, json.dumps(_exchanged(json.loads(before), rest)).encode()
    length = struct.unpack("<Q", before[:8])[0]
    header = json.dumps(_exchanged(json.loads(before[8 : 8 + length]), rest)).encode()
    return name, struct.pack("<Q", len(header)) + header + before[8 + length :]


def _exchanged(value: Any, way: bytes) -> Any:
    """`value` with what lies at the end of `way` exchanged, renamed or, in a list, repeated."""
    if not way:
        return value
    if len(way) == 1 or not isinstance(value, dict | list) or not value:
        return HOSTILE[way[0] % len(HOSTILE)]
    if isinstance(value, list):
        place = way[0] % len(value)
        return [*value[:place], _exchanged(value[place], way[1:]), *value[place + (way[0] < 250) :]]
    keys = list(value)
    key = keys[way[0] % len(keys)]
    if way[0] >= 250 and isinstance(hostile := HOSTILE[way[1] % len(HOSTILE)], str):
        return {(hostile if one == key else one): item for one, item in value.items()}
    return {**value, key: _exchanged(value[key], way[1:])}


def check(data: bytes, sandbox: Sandbox) -> None:
    """Raises AssertionError, or whatever the loader should not have raised, where a promise is broken."""
    from ludic.train.checkpoint import load_optimizer, read_state, training_folder, verify_checkpoint

    name, content = changed(data, sandbox.whole)
    path = sandbox.checkpoint / name
    path.write_bytes(content)
    optimizer = sandbox.optimizer()
    try:
        with only_files_below(sandbox.checkpoint):
            verified = _accepted(lambda: verify_checkpoint(sandbox.checkpoint))
            state = _accepted(lambda: read_state(sandbox.checkpoint))
            training = training_folder(sandbox.checkpoint)
            _accepted(lambda: load_optimizer(training, optimizer, model=sandbox.model))
    finally:
        path.write_bytes(sandbox.whole[name])
    if verified is not None and name != "manifest.json":
        assert content == sandbox.whole[name], f"a changed {name} was taken for whole"
    if state is not None:
        assert type(state[0].step) is int and state[0].step >= 0 and state[0].model
        json.dumps(dataclasses.asdict(state[0]), allow_nan=False)  # it can be saved again
    for parameter, stored in optimizer.state.items():
        assert stored["exp_avg"].shape == stored["exp_avg_sq"].shape == parameter.shape
        assert stored["exp_avg"].dtype == parameter.dtype and float(stored["step"]) >= 0


def _accepted(read: Any) -> tuple[Any] | None:
    """What was read, in a tuple; None where it was refused, in one line that does nothing to a terminal."""
    from ludic.storage.manifest import CheckpointError

    try:
        return (read(),)
    except CheckpointError as error:
        assert str(error).isprintable() and len(str(error)) < 3_000, repr(str(error))
        return None


_allowed: list[str] = []


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _allowed and isinstance(args[0], str) and not args[0].startswith("/proc/self/"):
        real = os.path.realpath(args[0])
        assert real == _allowed[0] or real.startswith(_allowed[0] + os.sep), f"{args[0]} was opened"


@contextlib.contextmanager
def only_files_below(folder: Path) -> Iterator[None]:
    """Opening any other file is a finding."""
    if not _watching:
        "\x1b".encode("unicode_escape")  # its module is read now, and not where it would be taken for a finding
        sys.addaudithook(_watch)  # there is no taking it away again: once, and it only looks while something is allowed
        _watching.append(True)
    _allowed.append(os.path.realpath(folder))
    try:
        yield
    finally:
        _allowed.clear()


_watching: list[bool] = []


def main() -> None:
    import atheris

    from tests.fuzz import start

    with atheris.instrument_imports(include=["json", "ludic"]):
        import ludic.train.checkpoint  # noqa: F401

    logging.disable(logging.CRITICAL)
    sandbox = Sandbox(Path(tempfile.gettempdir()) / "ludic-fuzz-checkpoint")
    start(SEEDS, lambda data: check(data, sandbox))


if __name__ == "__main__":
    main()

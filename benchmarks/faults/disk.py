"""Disks that are full, failing, read-only or slow, and folders that vanish, while a run saves and logs.

    python -m benchmarks.faults.disk --count 300

What is asked of a save: it ends with a checkpoint that verifies, or with one line that names the folder; the last good
checkpoint is still whole; after `recover_folder`, as the next start does it, nothing half written is left; and the next save
succeeds. A process that is killed says nothing, the rest holds for it too. What is asked of a log: every line that was
accepted is in the file, whole and in order, or one line says that the file cannot be written.

A full disk is a real one, a tmpfs in a mount namespace of its own, filled up to a random byte; where a process may not have
one, the limit on the size of its files stands in. Other failures are raised by the n-th operation on the folder.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.faults.outcome import Injection

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROW = "disk full, read-only, slow or failing, folder removed"
KILL_ROW = "trainer killed in mid-checkpoint"
SAVING = (
    "full",
    "I/O error",
    "I/O errors from then on",
    "read-only",
    "slow",
    "folder removed",
    "folder replaced by a file",
)
LOGGING = ("full", "I/O error", "slow", "folder removed", "file replaced")
KILLS = ("killed at an operation", "killed at an instant")
_TMPFS_MB = 64


def inject(count: int, *, seed: int, folder: Path, mounts: bool = True) -> list[Injection]:
    """`count` faults, of each kind as many, in a process of their own below `folder`; on a disk of their own if `mounts`
    and the system lets us."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "injections.json"
    words = [sys.executable, "-m", "benchmarks.faults.disk", "--worker", str(folder), "--count", str(count)]
    words += ["--seed", str(seed)]
    if mounts and _may_mount():
        words = ["unshare", "--user", "--map-root-user", "--mount", *words, "--mounts"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "Traceback" in done.stderr:
        raise RuntimeError(f"the process with the faults ended with {done.returncode}: {done.stderr[-2000:]}")
    return [Injection(**record) for record in json.loads(results.read_text())]


def _may_mount() -> bool:
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as point:
        words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", point]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0


# -- the n-th operation ------------------------------------------------------------------------------------------------


class Saboteur:
    """Calls `act` at the `at`-th operation on `folder` (and at all after it, if `stays`): names that are made, opened,
    changed or removed, as Python's audit events tell them, and writes and syncs of descriptors."""

    def __init__(self) -> None:
        self._armed: tuple[Path, int, bool, Callable[[], None]] | None = None
        self.seen = 0
        sys.addaudithook(self._audit)  # for ever, so there is one saboteur in a process
        for name in ("fsync", "write"):
            setattr(os, name, self._watched(getattr(os, name)))

    @contextlib.contextmanager
    def armed(self, folder: Path, at: int, act: Callable[[], None], *, stays: bool = False) -> Iterator[None]:
        self.seen, self._armed = 0, (folder, at, stays, act)
        try:
            yield
        finally:
            self._armed = None

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self._armed is not None and event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            path = args[0]
            if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(self._armed[0])):
                self._operation()

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            if self._armed is not None and args[0] > 2:
                self._operation()
            return function(*args)

        return watched

    def _operation(self) -> None:
        if self._armed is None:
            return
        self.seen += 1
        _, at, stays, act = armed = self._armed
        if self.seen == at or (stays and self.seen > at):
            self._armed = None  # what the fault itself does is no operation of the program
            try:
                act()
            finally:
                self._armed = armed


def _fail(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("in the way")


@contextlib.contextmanager
def _room(place: Path, left: int, *, mounts: bool) -> Iterator[None]:
    """Only `left` bytes more fit on the disk of `place`; without a disk of its own, into any one file."""
    if mounts:
        ballast = place / "ballast"
        with ballast.open("wb") as file, contextlib.suppress(OSError):
            free = os.statvfs(place)
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - left)))
        try:
            yield
        finally:
            ballast.unlink()
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _read_only(place: Path, saboteur: Saboteur, *, mounts: bool) -> Iterator[None]:
    if not mounts:
        with saboteur.armed(place, 1, _fail(errno.EROFS), stays=True):
            yield
        return
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)


# -- saving ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Saver:
    """A small policy after one step, and a save of it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    optimizer: "torch.optim.Optimizer"

    @classmethod
    def make(cls) -> "Saver":
        import torch
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        words = {f"w{number}": number for number in range(64)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.arange(32)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return cls(model=model, tokenizer=tokenizer, optimizer=optimizer)

    def save(self, checkpoints: Path, step: int, keep: int = 2) -> Path:
        import torch

        from ludic.train.checkpoint import TrainerState, save_checkpoint

        return save_checkpoint(
            checkpoints,
            model=self.model,
            weights=self.model.state_dict(),
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            state=TrainerState(step=step, policy_version=step, model="tiny", config={}),
            model_dtype=torch.bfloat16,  # so that masters are written too
            source_files={},
            keep=keep,
        )


@dataclass(slots=True)
class Bench:
    """Where faults are injected, and with what."""

    place: Path
    mounts: bool
    rng: random.Random
    saboteur: Saboteur
    saver: Saver
    operations: int = 0
    """That one save makes."""
    bytes: int = 0
    """That one checkpoint takes."""

    def measure(self) -> None:
        with self.saboteur.armed(self.place, 0, lambda: None):
            saved = self.saver.save(self.place / "measured", 1)
        self.operations = self.saboteur.seen
        self.bytes = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        shutil.rmtree(self.place / "measured")

    def fault(self, name: str, checkpoints: Path) -> contextlib.AbstractContextManager[None]:
        """One of `SAVING` or `KILLS`, at a random place of a save."""
        at = self.rng.randint(1, self.operations)
        saboteur = self.saboteur
        if name == "full":
            # Without a disk of its own the limit is on each file, of which the largest is half of the whole.
            left = self.rng.randrange(self.bytes if self.mounts else self.bytes // 3)
            return _room(self.place, left, mounts=self.mounts)
        if name == "read-only":
            return _read_only(self.place, saboteur, mounts=self.mounts)
        acts: dict[str, Callable[[], None]] = {
            "I/O error": _fail(errno.EIO),
            "I/O errors from then on": _fail(errno.EIO),
            "slow": lambda: time.sleep(0.01),
            "folder removed": lambda: shutil.rmtree(checkpoints, ignore_errors=True),
            "folder replaced by a file": lambda: _replace_by_a_file(checkpoints),
            "killed at an operation": lambda: os.kill(os.getpid(), signal.SIGKILL),
        }
        stays = name in ("I/O errors from then on", "slow")
        return saboteur.armed(checkpoints, 1 if name == "slow" else at, acts[name], stays=stays)


def _inject_saving(bench: Bench, name: str, number: int) -> Injection:
    from ludic.train.checkpoint import CheckpointError, checkpoint_step

    checkpoints = bench.place / f"save_{number}"
    before = bench.saver.save(checkpoints, 1)
    step = bench.rng.choice((1, 2))  # 1 takes the place of the one that is there
    error: CheckpointError | None = None
    started = time.perf_counter()
    with bench.fault(name, checkpoints):
        try:
            bench.saver.save(checkpoints, step, keep=bench.rng.choice((1, 2)))
        except CheckpointError as refusal:
            error = refusal
    seconds = time.perf_counter() - started
    vanishes = name.startswith("folder")
    problems = []
    if error is not None and ("\n" in str(error) or str(checkpoints) not in str(error)):
        problems.append(f"the error is not one line with the path: {error}")
    if checkpoints.is_file():
        checkpoints.unlink()
    found, more = _after(bench, checkpoints)
    problems += more
    expected = {step} if error is None else {1}
    if name == "I/O errors from then on":  # a disk that fails for good may also refuse to take the new name back
        expected.add(step)
    if not vanishes and checkpoint_step(found or Path("none")) not in expected:
        problems.append(
            f"after {error or 'a save that succeeded'} the last checkpoint is {found}, not of {before.name}"
        )
    refused = "refused in one line" if vanishes else "refused in one line, the last good one verifies"
    outcome = ("saved, and it verifies" if error is None else refused) + "; the next save succeeds"
    shutil.rmtree(checkpoints)
    return _injection(ROW, f"saving: {name}", problems, outcome, seconds)


def _inject_kill(bench: Bench, name: str, number: int) -> Injection:
    from ludic.train.checkpoint import checkpoint_step

    checkpoints = bench.place / f"kill_{number}"
    started = time.perf_counter()
    bench.saver.save(checkpoints, 1)
    one_save_s = time.perf_counter() - started
    step = bench.rng.choice((1, 2))
    fault = contextlib.nullcontext() if name == "killed at an instant" else bench.fault(name, checkpoints)
    instant = bench.rng.uniform(0, 1.2 * one_save_s)
    child = os.fork()
    if child == 0:
        with fault:
            bench.saver.save(checkpoints, step, keep=1)
        os._exit(0)
    if name == "killed at an instant":
        time.sleep(instant)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found, problems = _after(bench, checkpoints)
    at = checkpoint_step(found or Path("none"))
    if at not in (1, step) or (os.WIFEXITED(status) and at != step):
        problems.append(f"the last checkpoint is {found}")
    shutil.rmtree(checkpoints)
    came = "" if os.WIFSIGNALED(status) else " (it came too late)"
    return _injection(KILL_ROW, name + came, problems, "a whole checkpoint is there; the next save succeeds", None)


def _after(bench: Bench, checkpoints: Path) -> tuple[Path | None, list[str]]:
    """What a next start finds, once the fault is gone, and what is wrong with it."""
    from ludic.train.checkpoint import find_checkpoint, recover_folder, verify_checkpoint

    recover_folder(checkpoints)
    found = find_checkpoint(checkpoints)
    problems = [f"damaged: {line}" for line in found.passed_over]
    verify_checkpoint(bench.saver.save(checkpoints, 3))
    left = [path.name for path in checkpoints.iterdir() if not path.name.startswith("step_")]
    return found.path, problems + [f"left behind: {name}" for name in left]


# -- logging -----------------------------------------------------------------------------------------------------------


def _inject_logging(bench: Bench, name: str, number: int) -> Injection:
    """Metrics are written one by one, rollouts through a thread: each has its turn."""
    from ludic.storage.jsonl import read_jsonl

    rollouts = bench.rng.random() < 0.5
    folder = bench.place / f"log_{number}"
    path = folder / "log.jsonl"
    texts = ["x" * bench.rng.randrange(4000) for _ in range(60)]
    accepted, error = (_log_rollouts if rollouts else _log_metrics)(bench, name, path, texts)
    problems = []
    if error is not None and ("\n" in str(error) or str(path) not in str(error)):
        problems.append(f"the error is not one line with the path: {error}")
    if error is None and accepted < len(texts):
        problems.append(f"{accepted} lines of {len(texts)} and no error")
    gone = name.startswith("folder") or name == "file replaced"
    if not gone:
        lines = [record.get("event", record.get("text")) for record in read_jsonl(path)]
        if lines[:accepted] != texts[:accepted] or lines != texts[: len(lines)]:
            problems.append(f"{accepted} lines were accepted, {len(lines)} are there")
    if (error is None) != (name == "slow") and not (name == "full" and error is None):
        problems.append(f"unexpected: {error or 'no error'}")
    shutil.rmtree(folder, ignore_errors=True)
    what = (
        "all lines are there"
        if error is None
        else "refused in one line" + ("" if gone else "; the lines before are whole")
    )
    return _injection(ROW, f"logging {'rollouts' if rollouts else 'metrics'}: {name}", problems, what, None)


def _log_metrics(bench: Bench, name: str, path: Path, texts: list[str]) -> tuple[int, OSError | None]:
    from ludic.telemetry.loggers import make_logger

    accepted = 0
    with (
        contextlib.closing(make_logger("none", metrics_path=path, run_name="r", config={}, total_steps=None)) as logger,
        _logging_fault(bench, name, path, len(texts)),
    ):
        try:
            for accepted, text in enumerate(texts):
                logger.event(accepted, text)
        except OSError as error:
            return accepted, error
    return len(texts), None


def _log_rollouts(bench: Bench, name: str, path: Path, texts: list[str]) -> tuple[int, OSError | None]:
    from ludic.storage.jsonl import JsonlWriter

    accepted, found = 0, None
    writer = JsonlWriter(path)
    with _logging_fault(bench, name, path, len(texts)):
        try:
            for number, text in enumerate(texts):
                writer.write({"text": text})
                if number % 8 == 7 or number == len(texts) - 1:  # as the trainer does after each update
                    writer.flush()
                    accepted = number + 1
        except OSError as error:
            found = error
    with contextlib.suppress(OSError):
        writer.close()
    return accepted, found


def _logging_fault(bench: Bench, name: str, path: Path, count: int) -> contextlib.AbstractContextManager[None]:
    at = bench.rng.randint(1, count)
    if name == "full":
        return _room(bench.place, bench.rng.randrange(100_000), mounts=bench.mounts)

    def replace() -> None:
        path.unlink()
        path.write_text("another file")

    acts: dict[str, Callable[[], None]] = {
        "I/O error": _fail(errno.EIO),
        "slow": lambda: time.sleep(0.001),
        "folder removed": lambda: shutil.rmtree(path.parent, ignore_errors=True),
        "file replaced": replace,
    }
    # The first operation after a removal is the next line's, so it must not be the last.
    return bench.saboteur.armed(path, min(at, count - 10), acts[name], stays=name == "slow")


# -- all of them -------------------------------------------------------------------------------------------------------


def _injection(row: str, fault: str, problems: list[str], outcome: str, seconds: float | None) -> Injection:
    return Injection(row=row, fault=fault, outcome="; ".join(problems) or outcome, ok=not problems, seconds=seconds)


def _work(folder: Path, count: int, seed: int, *, mounts: bool) -> list[Injection]:
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    if mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_MB}m", "tmpfs", str(place)], check=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    bench = Bench(place=place, mounts=mounts, rng=random.Random(seed), saboteur=Saboteur(), saver=Saver.make())
    bench.measure()
    kinds: list[tuple[Callable[[Bench, str, int], Injection], str]] = []
    kinds += [(_inject_saving, name) for name in SAVING]
    kinds += [(_inject_logging, name) for name in LOGGING]
    kinds += [(_inject_kill, name) for name in KILLS]
    return [kinds[n % len(kinds)][0](bench, kinds[n % len(kinds)][1], n) for n in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=280)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-disk", action="store_true", help="without a disk of its own, as where none may be mounted"
    )
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--mounts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        injections = _work(args.worker, args.count, args.seed, mounts=args.mounts)
        (args.worker / "injections.json").write_text(json.dumps([asdict(injection) for injection in injections]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        injections = inject(args.count, seed=args.seed, folder=Path(folder), mounts=not args.no_disk)
    for (fault, outcome, ok), number in sorted(Counter((i.fault, i.outcome, i.ok) for i in injections).items()):
        sys.stdout.write(f"{number:4d}  {'ok    ' if ok else 'FAILED'}  {fault}: {outcome}\n")
    return 0 if all(injection.ok for injection in injections) else 1


if __name__ == "__main__":
    sys.exit(main())

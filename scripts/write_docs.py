"""Writes the parts of the documentation that are made from the code: flags, metrics, server defaults, public names,
capacity tables.

    uv run python scripts/write_docs.py            write them
    uv run python scripts/write_docs.py --check    say which are out of date, exit code 1

A part stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. `tests/test_docs.py` makes the same comparison.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ludic.inference.server.server_defaults import markdown_table
from ludic.telemetry.metric_names import metric_tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = tuple(ROOT / "docs" / name for name in ("api.md", "capacity.md", "flags.md", "metrics.md", "server.md"))


def load_script(name: str) -> ModuleType:
    """The module of a script in examples/gsm8k, without running it."""
    path = ROOT / "examples" / "gsm8k" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_parser() -> argparse.ArgumentParser:
    """The parser of train_gsm8k.py."""
    parser: argparse.ArgumentParser = load_script("train_gsm8k.py").build_parser()
    return parser


def eval_parser() -> argparse.ArgumentParser:
    """The parser of eval_gsm8k_vllm.py."""
    parser: argparse.ArgumentParser = load_script("eval_gsm8k_vllm.py").build_parser()
    return parser


def flag_table(parser: argparse.ArgumentParser) -> str:
    """A Markdown table of every flag but --help, under the names of the parser's own groups."""
    lines = ["| flag | meaning |", "|---|---|"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            lines.append(f"| **{group.title}** | |")
        for action in actions:
            help_text = (action.help or "") % {**vars(action), "prog": parser.prog}
            lines.append(f"| {_flags(action)} | {help_text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _flags(action: argparse.Action) -> str:
    """`--port N`: the names of a flag with what follows it."""
    value = ""
    if action.nargs != 0:
        shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else shown
        value = f" [{value}]" if action.nargs == "?" else f" {value}"
    return ", ".join(f"`{name}{value if name == action.option_strings[-1] else ''}`" for name in action.option_strings)


def names_table() -> str:
    """A Markdown table of the public names, each with its module and the first sentence of its docstring."""
    import ludic

    lines = ["| name | module | what it is |", "|---|---|---|"]
    for name in ludic.__all__:
        value = getattr(ludic, name)
        first = re.split(r"(?<=\.)\s|\n\n", inspect.getdoc(value) or "", maxsplit=1)[0]
        sentence = " ".join(first.split()).rstrip(".:").replace("|", "\\|")
        lines.append(f"| `{name}` | `{value.__module__}` | {sentence} |")
    return "\n".join(lines)


CAPACITY = {
    "capacity-plan": "--model 32B --training-gpus 8 --cpu-offload --servers 2 --tensor-parallel 4 --rollouts-per-update 512 "
    "--gradient-checkpointing",
    "capacity-layouts": "layouts --model 32B --gpus 32 --cpu-offload --rollouts-per-update 512 --gradient-checkpointing",
    "capacity-host": "layouts --model 7B --gpus 8 --rollouts-per-update 512 --gradient-checkpointing",
    "capacity-70b": "--model 70B --training-gpus 16 --cpu-offload --servers 2 --tensor-parallel 8 --rollouts-per-update 512 "
    "--gradient-checkpointing",
    "capacity-lora": "lora --lora-rank 16",
    "capacity-measured": "measured",
}
"""The parts of docs/capacity.md, and the flags of `python -m ludic.capacity` that print them."""


def capacity(part: str) -> str:
    """What the command of this part prints."""
    from ludic.capacity.__main__ import main as print_capacity

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_capacity(CAPACITY[part].split())
    return printed.getvalue().rstrip("\n")


PARTS: dict[str, Callable[[], str]] = {
    "flags": lambda: flag_table(train_parser()),
    "eval-flags": lambda: flag_table(eval_parser()),
    "metrics": metric_tables,
    "names": names_table,
    "server-defaults": markdown_table,
    **{part: functools.partial(capacity, part) for part in CAPACITY},
}


def rendered(text: str) -> str:
    """`text` with each generated part as it should be now.

    Raises:
        ValueError: a part begins and does not end.
    """
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in text:
            continue
        before, rest = text.split(begin, 1)
        if end not in rest:
            raise ValueError(f"{begin} is never closed by {end}")
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> int:
    """Write or check every document; the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated parts of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if something is out of date")
    args = parser.parse_args()
    num_stale = 0
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        current = rendered(text)
        if current == text:
            continue
        num_stale += 1
        if not args.check:
            path.write_text(current, encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}: {'out of date' if args.check else 'written'}\n")
    return 1 if args.check and num_stale else 0


if __name__ == "__main__":
    sys.exit(main())

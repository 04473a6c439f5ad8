"""`--help` of every benchmark answers before any heavy library: a reader looks at twenty of them to find the one they want."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_quick_answers import HEAVY

ROOT = Path(__file__).parents[1]
ASK_ALL = """
import contextlib, io, json, runpy, sys
answers = {}
for path in json.loads(sys.argv[1]):
    sys.argv, said, code = [path, "--help"], io.StringIO(), None
    before = set(sys.modules)
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code
    answers[path] = [code, said.getvalue().startswith("usage: "), sorted(set(sys.modules) - before)]
print(json.dumps(answers))
"""


def benchmarks() -> list[str]:
    """The commands of the README's table, and the other programs among the benchmarks."""
    _, _, table = (ROOT / "benchmarks" / "README.md").read_text().partition("| command |")
    listed = re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)
    paths = {
        name.removeprefix("-m ").replace(".", "/") + ".py" if name.startswith("-m ") else f"benchmarks/{name}"
        for name in listed
    }
    programs = {
        f"benchmarks/{path.name}"
        for path in (ROOT / "benchmarks").glob("*.py")
        if "\nif __name__ ==" in path.read_text()
    }
    return sorted(paths | programs)


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, bool, list[str]]]:
    """What each says to `--help`, all asked in one process: exit code, whether it was help, and modules new by then."""
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, json.dumps(benchmarks())], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, bool, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("path", benchmarks())
def test_help_of_a_benchmark_is_there_before_any_heavy_library(
    path: str, answers: dict[str, tuple[int, bool, list[str]]]
) -> None:
    code, is_help, imported = answers[path]
    assert (code, is_help) == (0, True)
    assert not HEAVY & {name.partition(".")[0] for name in imported}

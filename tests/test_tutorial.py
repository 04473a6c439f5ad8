"""docs/tutorial.md, as a reader follows it: its files are saved, its commands are run in their order, and the policy learns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL))
COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL))
UV = 'uv() { [ "$1 $2" = "run python" ] && shift 2 && "$PYTHON" "$@"; }'
"""This Python stands in for `uv run python`: it has what `uv sync` installs."""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The reader's folder at the end, and what the commands printed."""
    clone = tmp_path_factory.mktemp("clone")
    first, rest = COMMANDS.split("\n", 1)
    folder = clone / first.split()[-1]
    folder.mkdir()  # the first line makes it and goes there; the files are saved before the others are typed
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{UV}\n{rest}"],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return folder, done.stdout


def test_every_block_of_python_has_a_file_name_and_the_first_command_makes_the_folder() -> None:
    assert len(FILES) == len(re.findall(r"```python\n", PAGE)) >= 3
    assert re.match(r"mkdir \w+ && cd \w+\n", COMMANDS)
    assert all(line.startswith("uv run python ") for line in COMMANDS.splitlines()[1:])


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_whoever_follows_the_tutorial_gets_a_better_policy_and_a_report(followed: tuple[Path, str]) -> None:
    folder, output = followed
    before, after = (
        json.loads((folder / f"{name}.jsonl.summary.json").read_text())["accuracy"] for name in ("before", "after")
    )
    assert after > before
    assert "B is better" in output
    assert "<html" in (folder / "coins_train_report.html").read_text(encoding="utf-8")[:2000]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_every_file_that_the_tutorial_names_is_there_at_its_end(followed: tuple[Path, str]) -> None:
    named = re.findall(r"`(\w+\.(?:py|jsonl|html|png))`", PAGE)
    assert len(named) >= 5
    assert [name for name in named if not (followed[0] / name).exists()] == []

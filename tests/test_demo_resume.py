"""`--demo --resume` is refused, and what the refusal prints goes on with the demo's run."""

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from environments.gsm8k import NAME
from ludic.config import RunPaths
from ludic.config_file import write_config
from scripts import write_docs


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(write_docs.ROOT / "examples" / "gsm8k"))
    return write_docs.load_script("train_gsm8k.py")


@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "out of the way/step_2"]])
def test_the_refusal_names_the_flags_that_go_on_with_the_same_settings(
    script: ModuleType, resume: list[str], tmp_path: Path
) -> None:
    out_dir = tmp_path / "my runs"
    out_dir.mkdir()
    demo = ["--demo", "--out-dir", str(out_dir)]
    first = script.parse_arguments([*demo, "--train-steps", "3"])
    write_config(RunPaths(out_dir=out_dir, name=NAME).config, first.resolved, command="the demo")
    with pytest.raises(ValueError, match="it contradicts --resume; to go on with that of --out-dir") as refusal:
        script.parse_arguments([*demo, *resume])
    flags = re.search(r"give (--config .*)$", str(refusal.value))
    assert flags is not None
    args = script.parse_arguments(shlex.split(flags[1]))
    assert not args.demo and args.resume == (resume[1] if len(resume) > 1 else "latest")
    assert (args.dataset, args.model) == (str(out_dir / "gsm8k_demo"), str(out_dir / "gsm8k_demo" / "model"))
    now, then = ({**of.resolved, "task": None} for of in (args, first))
    assert now == then and args.train_steps == 3 and args.out_dir == str(out_dir)


def test_other_flags_that_the_demo_contradicts_are_named_as_before(script: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"it contradicts --dataset$"):
        script.parse_arguments(["--demo", "--dataset", "x.jsonl"])

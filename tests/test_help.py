"""What --help shows of each command, and what completes it in a shell."""

import argparse
import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ludic.capacity.__main__
import ludic.compare.__main__
import ludic.doctor.__main__
import ludic.report.__main__
from ludic.cli import PATH_FLAGS
from ludic.completion import PATHS, SHELLS, command_word, completion
from ludic.config import GRPOConfig
from ludic.inference.server.server_help import quick_parser
from scripts import write_docs

EXAMPLES = write_docs.ROOT / "examples"
COMMANDS = ("train", "eval", "sums", "eval_sums", "doctor", "report", "compare", "server")
Action = argparse.Action


@pytest.fixture
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of one command, by its name."""
    return build(request.param, monkeypatch)


def build(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    if name in ("sums", "eval_sums"):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [f"{name}.py"])
        made: argparse.ArgumentParser = runpy.run_path(str(EXAMPLES / f"{name}.py"))["build_parser"]()
        return made
    return {
        "train": write_docs.train_parser,
        "eval": write_docs.eval_parser,
        "doctor": ludic.doctor.__main__.build_parser,
        "report": ludic.report.__main__.build_parser,
        "capacity": ludic.capacity.__main__.build_parser,
        "compare": ludic.compare.__main__.build_parser,
        "server": quick_parser,
    }[name]()


def shown_flags(parser: argparse.ArgumentParser) -> list[Action]:
    ends = ("help", "print_completion", "version")
    return [
        one for one in parser._actions if one.option_strings and one.help != argparse.SUPPRESS and one.dest not in ends
    ]


def help_of(action: Action, parser: argparse.ArgumentParser) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


every_command = pytest.mark.parametrize("parser", COMMANDS, indirect=True)


# -- help ------------------------------------------------------------------------------------------------------------------


@every_command
def test_help_shows_every_default(parser: argparse.ArgumentParser) -> None:
    settings = dataclasses.asdict(GRPOConfig())
    for action in shown_flags(parser):
        default = settings[action.dest] if action.default == argparse.SUPPRESS else action.default
        shown = re.search(r"default: (.+)", help_of(action, parser), re.DOTALL)
        if default is None or (action.nargs == 0 and action.default != argparse.SUPPRESS):  # off unless it is given
            continue
        assert shown is not None, action.option_strings
        if isinstance(default, (int, float)):
            assert float(shown[1].strip(" )")) == default if not isinstance(default, bool) else str(default) in shown[1]


@every_command
def test_help_shows_every_flag_in_a_group_with_a_title(parser: argparse.ArgumentParser) -> None:
    of_argparse = {parser._optionals, parser._positionals}
    grouped = [one for group in parser._action_groups if group not in of_argparse for one in group._group_actions]
    assert [one.option_strings for one in shown_flags(parser) if one not in grouped] == []
    assert len(grouped) >= 3


# -- completion --------------------------------------------------------------------------------------------------------------


@every_command
def test_a_flag_that_takes_a_path_is_completed_by_paths(parser: argparse.ArgumentParser) -> None:
    taking = [one for one in parser._actions if one.nargs != 0 and one.help != argparse.SUPPRESS]
    for action in taking:
        shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        assert (shown in PATHS) == (action.dest in (*PATH_FLAGS, "config", "runs", "a", "b")), action


@every_command
def test_every_shell_gets_a_script_and_only_when_it_is_asked_for(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    for shell in SHELLS:
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["--print-completion", shell])
        script = capsys.readouterr().out
        assert end.value.code == 0 and command_word(parser) in script
        for action in shown_flags(parser):
            assert all(name.lstrip("-") in script for name in action.option_strings)


ASK = r"""
ask() {  # the words of a line, as bash hands them to a completion; what it answers, one a line
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  [[ $(complete -p "$1") =~ -F\ ([^ ]+) ]]
  "${BASH_REMATCH[1]}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
  printf '%s\n' "${COMPREPLY[@]}"
}
compopt() { :; }  # works inside a completion only
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Ask":
    """A bash that has the completions of three commands."""
    for name in ("train", "report", "server"):
        (tmp_path / f"{name}.bash").write_text(completion(build(name, monkeypatch), "bash"))
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file.jsonl").touch()
    return Ask(tmp_path)


class Ask:
    def __init__(self, folder: Path, before: str = "") -> None:
        self.folder, self.before = folder, before

    def __call__(self, *words: str) -> set[str]:
        scripts = "source train.bash; source report.bash; source server.bash"
        program = f'{self.before}\n{scripts}\n{ASK}\nask "$@"'
        ran = subprocess.run(
            ["bash", "--norc", "-c", program, "bash", *words],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.stderr == ""
        return set(ran.stdout.split())


@pytest.mark.parametrize(
    "words", [["train_gsm8k.py"], ["python", "x/train_gsm8k.py"], ["uv", "run", "python", "./x/train_gsm8k.py"]]
)
def test_bash_completes_flags_choices_and_paths_of_a_script_also_behind_python_and_uv(
    ask: Ask, words: list[str]
) -> None:
    assert ask(*words, "--micro-") == {"--micro-token-budget"}
    assert ask(*words, "--lr", "1e-4", "--loss", "d") == {"dr_grpo", "dapo"}
    assert ask(*words, "--config", "a_") == {"a_file.jsonl", "a_folder"}
    assert ask(*words, "--out-dir", "a_") == {"a_folder"}


def test_bash_completes_a_module_that_python_runs(ask: Ask) -> None:
    assert ask("python", "-m", "ludic.report", "--max") == {"--max-rollouts"}
    assert ask("uv", "run", "python", "-m", "ludic.report", "a_") == {"a_file.jsonl", "a_folder"}
    assert ask("python", "-m", "ludic.inference.vllm_server", "--no") == {"--no-training"}


def test_bash_leaves_other_lines_to_what_completed_them_before(ask: Ask) -> None:
    assert ask("python", "other.py", "--") == ask("python", "a_folder/", "--") == set()
    before = Ask(ask.folder, "_earlier() { COMPREPLY=(earlier); }; complete -F _earlier uv")
    assert before("uv", "pip", "--") == {"earlier"}
    assert before("uv", "run", "train_gsm8k.py", "--micro-") == {"--micro-token-budget"}


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_takes_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.zsh").write_text(completion(build("train", monkeypatch), "zsh"))
    program = (
        'autoload -Uz compinit; compinit -u -D; eval "$(<train.zsh)"; print ${_comps[train_gsm8k.py]} ${_comps[uv]}'
    )
    ran = subprocess.run(["zsh", "-f", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("_shtab_train_gsm8k_py _ludic_dispatch\n", "")

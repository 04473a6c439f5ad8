"""`--config run.toml`: what a file may hold, what is refused, and that a run's own file gives the same run once more."""

import argparse
import dataclasses
import itertools
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ludic.commands import given_command
from ludic.config import GRPOConfig, from_arguments, number_or_auto
from ludic.config_file import NOT_IN_A_FILE, RunParser, settable, write_config
from ludic.flags import add_run_arguments
from scripts import write_docs

TRAIN: ModuleType = write_docs.load_script("train_gsm8k.py")
EVALUATE: ModuleType = write_docs.load_script("eval_gsm8k_vllm.py")
BUILDERS: dict[str, Callable[[], RunParser]] = {"train": TRAIN.build_parser, "eval": EVALUATE.build_parser}
Write = Callable[[str], str]


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(write_docs.ROOT / "examples" / "gsm8k"))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def refused(build: Callable[[], RunParser], *words: str) -> str:
    with pytest.raises(ValueError) as refusal:
        build().parse_args(words)
    message = str(refusal.value)
    assert "\n" not in message
    return message


# -- which value counts ------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(write: Write) -> None:
    path = write("train_steps = 7\ngroup-size = 4\n")
    args = TRAIN.build_parser().parse_args(["--group-size", "16", "--config", path])
    config = from_arguments(args)
    assert (config.train_steps, config.group_size, config.seed) == (7, 16, GRPOConfig().seed)


def test_the_file_wins_over_the_demos_own_flags_and_a_flag_over_both(write: Write) -> None:
    path = write("demo = true\ntrain_steps = 7\nlr = 1e-3\n")
    args = TRAIN.parse_arguments(["--config", path, "--lr", "2e-3"])
    assert (args.train_steps, args.learning_rate, args.engine, args.group_size) == (7, 2e-3, "local", 8)


def test_names_may_be_written_with_dashes_and_by_their_short_form(write: Write) -> None:
    args = TRAIN.build_parser().parse_args(
        ["--config", write('max-tokens = 9\n"system-prompt" = "--x"\nserver_gpu = 1\n')]
    )
    assert (args.max_completion_len, args.system_prompt, args.server_gpu) == (9, "--x", 1)


def test_a_required_flag_may_stand_in_the_file(write: Write) -> None:
    parser = RunParser()
    parser.add_argument("--model", required=True)
    assert parser.parse_args(["--config", write('model = "m"\n')]).model == "m"


@pytest.mark.parametrize(
    ("line", "flag", "name"),
    [
        ("start_server = true", "--no-start-server", "start_server"),
        ("no_checks = true", "--checks", "no_checks"),
        ("seed_requests = true", "--no-seed-requests", "seed_requests"),
        ("compile = true", "--no-compile", "compile"),
    ],
)
def test_a_switch_that_the_file_turns_on_can_be_turned_off(write: Write, line: str, flag: str, name: str) -> None:
    path = write(line + "\n")
    assert getattr(TRAIN.build_parser().parse_args(["--config", path]), name) is True
    assert getattr(TRAIN.build_parser().parse_args(["--config", path, flag]), name) is False


def test_a_whole_number_is_a_number_and_auto_is_a_budget(write: Write) -> None:
    args = TRAIN.build_parser().parse_args(["--config", write('temperature = 1\nmicro_token_budget = "auto"\n')])
    assert args.temperature == 1.0 and args.micro_token_budget is None


# -- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        ("train", "temprature = 0.7", "there is no flag temprature: the nearest is temperature"),
        ("train", "no_compile = true", "there is no flag no_compile: the nearest is compile"),
        ("train", "xyzzy = 1", "there is no flag xyzzy: the keys are the long names of the flags that --help lists"),
        ("train", "samples = 4", "samples is a flag of the evaluation, not of this command"),
        ("eval", "train-steps = 4", "train-steps is a flag of the training, not of this command"),
        ("train", "resume = true", "resume says what to do now: give --resume on the command line"),
        ("eval", "overwrite = true", "overwrite says what to do now: give --overwrite on the command line"),
        ("eval", "resume_eval = true", "give --resume-eval on the command line"),
        ("train", "[memory]\ncompile = true", "there are no tables in this file, so write the keys of [memory] at the top"),
        ("train", "lr = 1e-4\nlearning_rate = 1e-4", "lr and learning_rate are the same flag: leave out one of them"),
        ("train", 'group_size = "8"', 'group_size = "8", but it has to be a whole number'),
        ("train", "group_size = 8.0", "group_size = 8.0, but it has to be a whole number"),
        ("train", "group_size = true", "group_size = true, but it has to be a whole number"),
        ("train", 'temperature = "hot"', 'temperature = "hot", but it has to be a number'),
        ("train", "model = 7", "model = 7, but it has to be a string in quotes"),
        ("train", "verbose = 1", "verbose = 1, but it has to be true or false"),
        ("train", 'compile = "yes"', 'compile = "yes", but it has to be true or false'),
        ("train", 'loss = "ppo"', 'loss = "ppo", but it has to be one of "grpo", "dr_grpo", "dapo", "gspo", "cispo"'),
        ("train", "limit = [1, 2]", "limit = [1, 2], but it has to be a whole number"),
        ("train", 'micro_token_budget = "much"', 'it has to be a whole number or "auto"'),
        ("train", "system_prompt = 1979-05-27", "it has to be a string in quotes"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_line_with_the_file(write: Write, command: str, line: str, said: str) -> None:
    path = write(line + "\n")
    message = refused(BUILDERS[command], "--config", path)
    assert message.startswith(f"{path}: ") and said in message


def test_a_value_out_of_range_is_refused_as_that_of_a_flag(write: Write) -> None:
    with pytest.raises(ValueError, match="--group-size must be at least 2, not 1"):
        from_arguments(TRAIN.build_parser().parse_args(["--config", write("group_size = 1\n")]))


def test_what_the_demo_brings_itself_is_refused_also_in_a_file(write: Write) -> None:
    with pytest.raises(ValueError, match="it contradicts --dataset"):
        TRAIN.parse_arguments(["--demo", "--config", write('dataset = "x.jsonl"\n')])


def test_a_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path: Path, write: Write) -> None:
    assert refused(TRAIN.build_parser, "--config", str(tmp_path / "none.toml")).endswith(
        "none.toml: No such file or directory"
    )
    assert refused(TRAIN.build_parser, "--config", str(tmp_path)).endswith(": Is a directory")
    assert "is not TOML: " in refused(TRAIN.build_parser, "--config", write("lr = \n"))
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"\n')
    assert "is not TOML: " in refused(TRAIN.build_parser, "--config", str(tmp_path / "latin.toml"))


def test_a_key_that_acts_on_a_terminal_is_shown_inert(write: Write) -> None:
    assert "\x1b" not in refused(TRAIN.build_parser, "--config", write('"\\u001b]0;x" = 1\n'))
    assert "\x1b" not in refused(TRAIN.build_parser, "--config", write('limit = "\\u001b]0;x"\n'))


# -- the file that a run leaves ----------------------------------------------------------------------------------------------


def _value_of(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """Words that set the flag, to anything that argparse takes."""
    name = action.option_strings[0]
    if action.nargs == 0:
        return st.sampled_from([[one] for one in action.option_strings])
    text: st.SearchStrategy[str]
    if action.choices is not None:
        text = st.sampled_from([str(choice) for choice in action.choices])
    elif action.type is number_or_auto:
        text = st.one_of(st.just("auto"), st.integers().map(str))
    elif action.type is int:
        text = st.integers().map(str)
    elif action.type is float:
        text = st.floats(allow_nan=False).map(repr)
    else:
        text = st.text()
    if isinstance(action, argparse._AppendAction):
        return st.lists(text, min_size=1).map(lambda values: [f"{name}={value}" for value in values])
    return text.map(lambda value: [f"{name}={value}"])


def _command_lines(build: Callable[[], RunParser]) -> st.SearchStrategy[list[str]]:
    flags = {action.dest: _value_of(action) for action in settable(build()).values()}
    chosen = st.lists(st.sampled_from(list(flags)), unique=True)
    words = chosen.flatmap(lambda names: st.tuples(*(flags[name] for name in names)))
    return words.map(lambda several: list(itertools.chain.from_iterable(several)))


@pytest.mark.parametrize("command", BUILDERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_file_of_a_run_gives_every_flag_the_same_value_again(
    command: str, tmp_path: Path, data: st.DataObject
) -> None:
    build = BUILDERS[command]
    first = build().parse_args(data.draw(_command_lines(build)))
    path = tmp_path / "out_config.toml"
    write_config(path, first.resolved, command="train \x1b \n")
    second = build().parse_args(["--config", str(path)])
    assert second.resolved == first.resolved
    again, before = vars(second), vars(first)
    for name, value in before.items():
        if name not in ("config", "resolved"):
            assert again[name] == value and type(again[name]) is type(value), name


def test_the_file_of_a_run_has_every_flag_with_a_value_also_where_none_was_given(tmp_path: Path) -> None:
    path = tmp_path / "out_config.toml"
    for build in BUILDERS.values():
        write_config(path, build().parse_args([]).resolved, command="train")
        written, parser, config = tomllib.loads(path.read_text()), build(), dataclasses.asdict(GRPOConfig())
        names = settable(parser)
        for action in parser._actions:
            default = config.get(action.dest) if action.default == argparse.SUPPRESS else action.default
            belongs = action in names.values() and default not in (None, [])
            assert belongs == any(one is action for name, one in names.items() if name in written), action


def test_the_file_of_a_demo_run_is_taken_back(tmp_path: Path) -> None:
    first = TRAIN.parse_arguments(["--demo", "--train-steps", "3"])
    write_config(tmp_path / "c.toml", first.resolved, command="train")
    second = TRAIN.parse_arguments(["--config", str(tmp_path / "c.toml")])
    assert second.resolved == first.resolved and from_arguments(second) == from_arguments(first)


def test_what_says_what_to_do_now_is_not_in_the_file_of_a_run() -> None:
    trained = TRAIN.build_parser().parse_args(["--resume", "--verbose"]).resolved
    evaluated = EVALUATE.build_parser().parse_args(["--overwrite"]).resolved
    assert trained["files and log"]["verbose"] is True
    assert not {name for values in (*trained.values(), *evaluated.values()) for name in values} & set(NOT_IN_A_FILE)


def test_a_path_that_is_no_unicode_is_named_in_the_file_and_left_out(tmp_path: Path) -> None:
    args = TRAIN.build_parser().parse_args(["--dataset", os.fsdecode(b"\xff"), "--limit", "3"])
    write_config(tmp_path / "c.toml", args.resolved, command="train")
    text = (tmp_path / "c.toml").read_text(encoding="utf-8")
    assert r"# dataset: \udcff is not Unicode" in text
    assert "dataset" not in tomllib.loads(text) and tomllib.loads(text)["limit"] == 3


def test_the_command_that_continues_a_run_names_its_file_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.toml", "--lr", "1e-4"])
    command = given_command("--resume", without=("--resume",))
    assert command.endswith("train.py --config run.toml --lr 1e-4 --resume")


def test_a_flag_that_may_be_repeated_is_an_array_in_the_file_and_replaced_as_a_whole(write: Write) -> None:
    file = ["--config", write('server = ["http://a:1", "http://b:1"]\n')]
    assert TRAIN.build_parser().parse_args(file).server == ["http://a:1", "http://b:1"]
    assert TRAIN.build_parser().parse_args([*file, "--server", "http://c:1"]).server == ["http://c:1"]
    file = ["--config", write('checkpoints = ["a", "b"]\n')]
    assert EVALUATE.build_parser().parse_args([*file, "--checkp", "c", "d", "--limit", "1"]).checkpoints == ["c", "d"]
    assert EVALUATE.build_parser().parse_args([*file, "--limit", "1"]).checkpoints == ["a", "b"]
    assert refused(TRAIN.build_parser, "--config", write('server = "http://a:1"\n')).endswith("an array of strings")
    assert refused(TRAIN.build_parser, "--config", write("server = [1]\n")).endswith("an array of strings")


def test_a_parser_of_a_task_of_ones_own_takes_a_file(write: Write) -> None:
    parser = RunParser()
    parser.add_argument("--largest", type=int, default=40)
    add_run_arguments(parser)
    args = parser.parse_args(["--config", write('largest = 9\nengine = "local"\n')])
    assert (args.largest, args.engine) == (9, "local")
    assert args.resolved["options"]["largest"] == 9


def test_a_flag_that_there_is_not_is_one_line_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        TRAIN.build_parser().parse_args(["--trainsteps", "4"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--trainsteps" in said and "the nearest flag is --train-steps" in said

"""`python -m ludic.doctor --config run.toml`: the doctor takes the file that a training takes, and the one that it leaves."""

import sys
from pathlib import Path

import pytest

from ludic.config import from_arguments
from ludic.config_file import RunParser, write_config
from ludic.doctor import __main__ as doctor
from ludic.flags import add_run_arguments
from scripts import write_docs


def leave_config(path: Path, parser: RunParser, *flags: str) -> list[str]:
    """The file that a training with these flags leaves, and the doctor's flags for it."""
    write_config(path, parser.parse_args(flags).resolved, command="train")
    return ["--config", str(path)]


def test_the_file_that_a_training_left_gives_the_doctor_the_settings_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(write_docs.ROOT / "examples" / "gsm8k"))
    training = write_docs.load_script("train_gsm8k.py").build_parser()
    flags = ["--model", "m", "--group-size", "4", "--verbose", "--server", "http://a:1", "--limit", "9"]
    args = doctor.build_parser().parse_args(leave_config(tmp_path / "c.toml", training, *flags))
    assert (args.model, args.server) == ("m", ["http://a:1"])
    assert from_arguments(args) == from_arguments(training.parse_args(flags))
    assert args.passed_over == ["demo", "limit", "system_prompt"]


def test_a_flag_of_the_doctor_wins_over_the_file(tmp_path: Path) -> None:
    file = leave_config(tmp_path / "c.toml", doctor.build_parser(), "--group-size", "4")
    assert from_arguments(doctor.build_parser().parse_args([*file, "--group-size", "16"])).group_size == 16


def test_flags_of_a_task_of_ones_own_are_named_and_a_likely_typo_is_a_warning(tmp_path: Path) -> None:
    parser = RunParser()
    parser.add_argument("--largest", type=int, default=40)
    add_run_arguments(parser)
    file = leave_config(tmp_path / "c.toml", parser, "--logger", "none")
    found = doctor.check_config(doctor.build_parser().parse_args(file))
    assert found.status == "ok" and found.found.endswith("only the training script can check: largest")
    (tmp_path / "c.toml").write_text("temprature = 0.7\nlargest = 40\n")
    found = doctor.check_config(doctor.build_parser().parse_args(file))
    assert found.status == "warning" and found.fix == "did you mean temperature for temprature?"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('group_size = "8"', 'group_size = "8", but it has to be a whole number'),
        ("resume = true", "resume says what to do now"),
        ("[memory]\ncompile = true", "there are no tables in this file"),
    ],
)
def test_what_no_training_would_take_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(line + "\n")
    assert doctor.main(["--config", str(path)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("python -m ludic.doctor: error: ") and said in complaint and complaint.count("\n") == 1


def test_the_doctor_says_first_what_it_left_to_the_training_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "local_checks", lambda args, config: [])
    monkeypatch.setattr(doctor, "ask_hub_once", lambda args: None)
    (tmp_path / "c.toml").write_text('engine = "local"\nlargest = 40\n')
    assert doctor.main(["--config", str(tmp_path / "c.toml")]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("only the training script can check: largest")


def test_a_forecast_hands_the_file_over_to_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "local_checks", lambda args, config: [])
    monkeypatch.setattr(doctor, "ask_hub_once", lambda args: None)
    became: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda program, words: became.append(words))
    (tmp_path / "c.toml").write_text('engine = "local"\n')
    doctor.main(["--config", str(tmp_path / "c.toml"), "--forecast"])
    assert became == [
        [sys.executable, str(doctor.GSM8K_SCRIPT), "--config", str(tmp_path / "c.toml"), "--forecast", "--no-checks"]
    ]

"""What the flags of the engine are said to do is true of the command that shows them."""

import argparse

import pytest

from ludic.flags import add_evaluation_arguments, add_run_arguments


def help_of(flag: str, *, evaluation: bool) -> str:
    parser = argparse.ArgumentParser()
    if evaluation:
        add_evaluation_arguments(parser, out="records.jsonl")
    else:
        add_run_arguments(parser)
    (found,) = (action for action in parser._actions if flag in action.option_strings)
    return found.help or ""


@pytest.mark.parametrize("flag", ["--server", "--start-server", "--server-wait"])
def test_an_evaluation_promises_nothing_that_only_training_does(flag: str) -> None:
    training, evaluation = (help_of(flag, evaluation=choice) for choice in (False, True))
    assert training != evaluation
    assert not any(words in evaluation for words in ("training", "start it again", "several servers"))


def test_an_evaluation_says_that_it_does_not_wait_for_a_server_and_how_it_goes_on() -> None:
    assert "does not wait for a lost server" in help_of("--server-wait", evaluation=True)
    assert "--resume-eval" in help_of("--start-server", evaluation=True)

"""`--version`: one line with what is installed, from every command."""

import argparse
import importlib.metadata
import platform

import pytest

from ludic import versions
from ludic.versions import add_version_argument, installed_versions


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    parser = argparse.ArgumentParser()
    parser.add_argument("needed")
    add_version_argument(parser)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--version"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_one_line_names_the_version_of_ludic_of_python_and_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    line = printed(capsys)
    ludic, torch = importlib.metadata.version("ludic"), importlib.metadata.version("torch")
    assert line.startswith(f"ludic {ludic} (Python {platform.python_version()}, torch {torch}, ")
    assert line.endswith(")\n") and line.count("\n") == 1


def test_what_is_not_installed_is_not_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "PACKAGES", ("ludic-of-nowhere", "torch"))
    assert installed_versions() == {"torch": importlib.metadata.version("torch")}
    assert printed(capsys).startswith("ludic of a folder that is not installed (Python ")

"""`.ci/audit` with a stand-in for uv: what it lets pass, what it refuses, and what it says when nobody can be asked."""

import datetime
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit"
INDEX = "https://index.example/simple"
UNREACHABLE = """Resolved 2 packages in 5ms
error: Request failed after 3 retries
  cause: error sending request for url (https://service.example/v1/querybatch)
  cause: dns error
"""
TODAY = datetime.datetime.now(datetime.UTC).date()


def wheel(**changed: str) -> str:
    fields = {"url": "https://files.example/a.whl", "hash": "sha256:" + "0" * 64, **changed}
    return "{ " + ", ".join(f'{name} = "{value}"' for name, value in fields.items() if value) + " }"


def lock(*packages: str) -> str:
    own = '[[package]]\nname = "own"\nversion = "1"\nsource = { editable = "." }\n'
    return "version = 1\n" + own + "".join(f"[[package]]\n{package}\n" for package in packages)


def package(name: str = "a", source: str = f'registry = "{INDEX}"', files: str | None = None, more: str = "") -> str:
    wheels = wheel() if files is None else files
    return f'name = "{name}"\nversion = "1.0"\nsource = {{ {source} }}\nwheels = [{wheels}]\n{more}'


def report(*vulnerabilities: dict[str, Any], statuses: tuple[object, ...] = ()) -> str:
    return json.dumps({"vulnerabilities": vulnerabilities, "adverse_statuses": statuses})


def vulnerability(id_: str = "GHSA-1", **changed: Any) -> dict[str, Any]:
    found = {"dependency": {"name": "a", "version": "1.0"}, "id": id_, "aliases": ["CVE-7"]}
    return {**found, "summary": "it \x1b]0;bites\x07", "fix_versions": ["1.1"], **changed}


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("ci_audit", str(AUDIT))
    spec = importlib.util.spec_from_loader("ci_audit", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(module)
    return module


@pytest.fixture
def audit(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs the script over a lock, with a uv that answers `out`, `err` and `code`."""

    def run(
        *, lockfile: str = "", out: str = report(), err: str = "", code: int = 0, lock_code: int = 0, excepted: str = ""
    ) -> Done:
        (tmp_path / ".ci").mkdir(exist_ok=True)
        (tmp_path / ".ci" / "audit-exceptions").write_text("# a comment\n\n" + excepted)
        (tmp_path / "uv.lock").write_text(lockfile or lock(package()))

        def uv(root: Path, *words: str) -> "subprocess.CompletedProcess[str]":
            if words[0] == "lock":
                return subprocess.CompletedProcess(words, lock_code, "", "error: the lockfile needs to be updated")
            assert words[:2] == ("audit", "--locked") and root == tmp_path
            return subprocess.CompletedProcess(words, code, out, err)

        monkeypatch.setattr(script, "run_uv", uv)
        try:
            returncode: int = script.main(tmp_path)
        except SystemExit as left:
            returncode = int(str(left.code))
        return Done(returncode, *capsys.readouterr())

    return run


def test_the_script_runs_by_itself_with_the_uv_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "uv.lock").write_text(lock(package()))
    stub = tmp_path / "uv"
    stub.write_text(f"#!/bin/sh\n[ $1 = lock ] && exit 0\necho '{report(vulnerability())}'\nexit 1\n")
    stub.chmod(0o755)
    command = [sys.executable, str(AUDIT), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "UV": str(stub)}, capture_output=True, text=True)
    assert done.returncode == 1 and "GHSA-1 in a 1.0" in done.stdout and done.stderr.startswith("audit: 1 findings")


def test_a_lock_without_a_known_vulnerability_passes_and_says_so(audit: Callable[..., Done]) -> None:
    done = audit()
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 locked packages" in done.stdout and "no known vulnerability" in done.stdout


def test_a_known_vulnerability_fails_and_is_named_with_the_version_that_mends_it(audit: Callable[..., Done]) -> None:
    done = audit(out=report(vulnerability()), code=1)
    assert done.returncode == 1
    assert r"GHSA-1 in a 1.0, fixed in 1.1: it \x1b]0;bites\x07" in done.stdout and "\x1b" not in done.stdout
    assert "1 findings: upgrade" in done.stderr


@pytest.mark.parametrize("id_", ["GHSA-1", "CVE-7"])
def test_an_exception_with_a_date_and_a_reason_passes_until_that_date(audit: Callable[..., Done], id_: str) -> None:
    found, reason = report(vulnerability()), "we never call the part that bites"
    for day, code in ((TODAY, 0), (TODAY - datetime.timedelta(days=1), 1)):
        done = audit(out=found, code=1, excepted=f"{id_} {day} {reason}\n")
        assert done.returncode == code, done.stdout + done.stderr
        assert f"excepted until {day}" in done.stdout if code == 0 else f"its exception ended on {day}" in done.stdout


@pytest.mark.parametrize(
    "line",
    ["GHSA-1", "GHSA-1 because I say so", f"GHSA-1 {TODAY}", f"GHSA-1 {TODAY} meh", "GHSA-1 2026-13-01 a good reason"],
)
def test_an_exception_without_a_date_or_a_reason_fails(audit: Callable[..., Done], line: str) -> None:
    done = audit(out=report(vulnerability()), code=1, excepted=line + "\n")
    assert done.returncode == 1 and ".ci/audit-exceptions:3:" in done.stderr


def test_an_exception_for_what_is_not_found_any_more_fails(audit: Callable[..., Done]) -> None:
    done = audit(excepted=f"GHSA-1 {TODAY} we never call the part that bites\n")
    assert done.returncode == 1 and "GHSA-1 is excepted and not found" in done.stdout


@pytest.mark.parametrize(
    "err",
    [
        UNREACHABLE,
        "error: Auditing requires network access and cannot be performed in offline mode",
        "error: HTTP status client error (403 Forbidden) for url (https://service.example/)",
        "error: HTTP status server error (503 Service Unavailable) for url (https://service.example/)",
    ],
)
def test_a_service_that_cannot_be_reached_is_said_and_passes(audit: Callable[..., Done], err: str) -> None:
    done = audit(out="", err=err, code=2)
    assert done.returncode == 0
    assert "NOT AUDITED" in done.stdout and "unreachable" in done.stdout and "no known" not in done.stdout


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"out": "", "err": "error: unrecognized subcommand 'audit'", "code": 2}, "this uv has no audit: update it"),
        ({"out": "", "err": "error: a bug", "code": 2}, "ended with code 2: error: a bug"),
        ({"out": "all is well", "code": 0}, "a form that is not known"),
        ({"out": "{}", "code": 0}, "a form that is not known"),
        ({"out": report(vulnerability()), "code": 0}, "code 0 and 1 findings, which do not agree"),
        ({"out": report(), "code": 1}, "code 1 and 0 findings, which do not agree"),
    ],
)
def test_a_tool_that_does_not_answer_as_expected_does_not_pass_for_clean(
    audit: Callable[..., Done], answer: dict[str, Any], reason: str
) -> None:
    done = audit(**answer)
    assert done.returncode == 2 and reason in done.stderr


def test_a_package_that_its_index_warns_of_fails(audit: Callable[..., Done]) -> None:
    done = audit(out=report(statuses=({"name": "a", "status": "quarantined"},)), code=1)
    assert done.returncode == 1 and "quarantined" in done.stdout


@pytest.mark.parametrize(
    ("lockfile", "reason"),
    [
        (lock(package(source='git = "https://git.example/a"')), "a comes from git"),
        (lock(package(source='url = "https://files.example/a.whl"')), "a comes from url"),
        (lock(package(source='path = "../a"')), "a comes from path"),
        (lock(package(source='registry = "http://index.example"')), "not from an index over https"),
        (lock(package(source='registry = "../index"')), "not from an index over https"),
        (lock(package(), package("b", source='registry = "https://other.example"')), "come from 2 indexes"),
        (lock(package(files=wheel(hash=""))), "a has a file without a SHA-256"),
        (lock(package(files=wheel(hash="md5:" + "0" * 32))), "a has a file without a SHA-256"),
        (lock(package(files=wheel(url="http://files.example/a.whl"))), "does not come over https"),
        (lock(package(files="")), "a has no file"),
        (lock(package(more="yanked = true")), "a 1.0 was yanked"),
    ],
)
def test_a_lock_that_takes_something_on_trust_fails_also_where_nobody_can_be_asked(
    audit: Callable[..., Done], lockfile: str, reason: str
) -> None:
    done = audit(lockfile=lockfile, out="", err=UNREACHABLE, code=2)
    assert done.returncode == 1 and reason in done.stderr


def test_a_lock_that_does_not_fit_pyproject_fails_also_where_nobody_can_be_asked(audit: Callable[..., Done]) -> None:
    done = audit(out="", err=UNREACHABLE, code=2, lock_code=1)
    assert done.returncode == 1 and "does not fit pyproject.toml: run uv lock" in done.stderr

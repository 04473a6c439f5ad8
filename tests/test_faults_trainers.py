"""The injections of the row "two trainers on one server": a few of each kind, and that they notice a guard that fails."""

import collections

import pytest

from benchmarks.faults import trainers
from ludic.inference.server import server_guard
from ludic.inference.server.server_guard import ServerGuard
from ludic.inference.server.trainer_lease import Holder, TrainerLease


def test_two_trainers_never_share_a_server_and_each_refusal_names_the_first() -> None:
    injections = trainers.inject(30 * len(trainers.KINDS), seed=4)
    assert [one for one in injections if not one.ok] == []
    assert collections.Counter(one.fault for one in injections) == dict.fromkeys(trainers.KINDS, 30)


def test_the_same_seed_injects_the_same() -> None:
    assert trainers.inject(40, seed=1) == trainers.inject(40, seed=1)


def broken(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, value: object) -> set[str]:
    monkeypatch.setattr(owner, name, value, raising=False)
    return {one.fault for one in trainers.inject(10 * len(trainers.KINDS), seed=0) if not one.ok}


def test_a_lease_that_lets_everybody_in_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    anybody = Holder(lease=1, identity={}, seen=0.0)
    monkeypatch.setattr(TrainerLease, "keep", lambda *_: anybody)
    found = broken(monkeypatch, TrainerLease, "_require_free", lambda *_: None)
    assert found == trainers.KINDS.keys() - {"an evaluation beside the trainer"}


def test_a_guard_that_does_not_look_again_when_an_answer_is_ready_breaks_the_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = broken(monkeypatch, ServerGuard, "_send_if_still_held", lambda self, send, token, lease: send)
    assert found == {"the same, with completions on their way"}


def test_a_guard_that_forgets_who_lost_the_server_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken(monkeypatch, TrainerLease, "_lose_to", lambda *_: None)
    assert {"the first sleeps through its lease, a second comes", "the same, while the first sleeps"} <= found


def test_a_route_that_is_thought_harmless_and_is_not_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    found = broken(monkeypatch, server_guard, "LOOKUP_PATHS", frozenset(trainers.CONTROL))
    assert "a second trainer arrives" in found and "a client without a lease controls the server" in found


def test_the_program_prints_what_came_of_each_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["trainers", "--count", "20"])
    assert trainers.main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= len(trainers.KINDS) + 1 and printed[-1].startswith("20 injections, 0 broken promises")

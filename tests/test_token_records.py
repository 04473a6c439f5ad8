"""Token data of a run: advantages and log-probs in the rollouts, the trainer's gaps in a file of their own."""

import asyncio
import contextlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ludic.run.training import _clear_the_way
from ludic.storage.jsonl import read_jsonl
from ludic.train.advantages import group_advantages
from ludic.train.checkpoint import save_checkpoint
from ludic.train.token_records import token_ends
from tests.test_trainer import Run, same_weights


def decode(token_ids: Any) -> str:
    """Bytes in the place of tokens."""
    return bytes(token_ids).decode(errors="replace")


def gaps_of(run: Run) -> dict[tuple[int, int, int], list[float]]:
    rows: list[Any] = read_jsonl(run.paths.token_gaps)
    return {(row["step"], row["group"], row["rollout"]): row["completion_logprob_gaps"] for row in rows}


@pytest.fixture(scope="module")
def pair(digit_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same run without and with the flag; rollouts are an update old, so that the two sides' log-probs differ."""
    runs = [
        Run(digit_policy_dir, tmp_path_factory.mktemp(name), max_staleness=1, train_steps=3, rollouts_per_update=32,
            epochs_per_update=2, record_token_logprobs=wanted)
        for name, wanted in (("plain", False), ("recorded", True))
    ]  # fmt: skip
    for run in runs:
        run.go()
    return runs[0], runs[1]


def test_a_run_that_records_its_tokens_is_bit_for_bit_the_run_that_does_not(pair: tuple[Run, Run]) -> None:
    plain, recorded = pair
    assert recorded.logger.updates() == plain.logger.updates()
    assert same_weights(recorded.model, plain.model)
    page = (Path(__file__).parents[1] / "docs/files.md").read_text()
    documented = page.partition("## Fields with `--record-token-logprobs`")[2].partition("\n## ")[0]
    added = set(recorded.rollouts()[0]) - set(plain.rollouts()[0])
    assert added == {"completion_logprobs", "completion_token_ends"}
    assert all(f"| `{name}` |" in documented for name in {*added, "completion_logprob_gaps"})
    rows = [{name: value for name, value in row.items() if name not in added} for row in recorded.rollouts()]
    assert rows == plain.rollouts()
    assert not plain.paths.token_gaps.exists()


def test_the_gap_of_each_token_is_the_trainers_log_prob_less_the_samplers(pair: tuple[Run, Run]) -> None:
    _, run = pair
    gaps, rows = gaps_of(run), run.rollouts()
    trained = {(row["step"], row["group"], row["rollout"]): row for row in rows if row["advantage"]}
    assert gaps.keys() == trained.keys() and len(gaps) > 20
    assert all(len(numbers) == len(trained[key]["completion_token_ids"]) for key, numbers in gaps.items())
    logged = [row["logprob_gap"] for row in run.logger.updates()]
    largest = [row["logprob_gap_max"] for row in run.logger.updates()]
    for step in (1, 2, 3):
        sizes = [abs(gap) for key, numbers in gaps.items() if key[0] == step for gap in numbers]
        if step == 1:  # on-policy and in float32
            assert max(sizes) < 1e-4
        else:  # of two epochs the metrics are the last one's, whose `old` log-probs are those of the first
            assert max(sizes) == pytest.approx(largest[step - 1], abs=2e-6) and max(sizes) > 1e-3
            assert sum(sizes) / len(sizes) == pytest.approx(logged[step - 1], abs=2e-6)


def test_a_record_has_its_advantage_and_where_its_tokens_end(pair: tuple[Run, Run]) -> None:
    _, run = pair
    rows = run.rollouts()
    for first in range(0, len(rows), 8):
        members = rows[first : first + 8]
        wanted = group_advantages([row["reward"] for row in members], normalise_std=True)
        assert [row["advantage"] for row in members] == pytest.approx(wanted, abs=1e-6)
    for row in rows:
        ends = row["completion_token_ends"]
        assert len(ends) == len(row["completion_logprobs"]) == row["completion_tokens"]
        assert ends == sorted(ends) and ends[-1] == len(row["completion"])


def test_log_probs_that_were_not_asked_for_are_in_no_record(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path, rollouts_per_update=32, logprob_share=0.25, record_token_logprobs=True)
    run.go()
    with_logprobs = {row["group"] for row in run.rollouts() if "completion_logprobs" in row}
    assert (
        with_logprobs == {group for group in range(8) if run.config.wants_logprobs(group)} and len(with_logprobs) == 2
    )
    assert {group for _, group, _ in gaps_of(run)} <= with_logprobs


def test_a_resumed_run_has_the_gaps_of_every_update_once(digit_policy_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rollouts_per_update": 32, "logprob_share": 1.0, "record_token_logprobs": True}
    whole = Run(digit_policy_dir, tmp_path / "whole", train_steps=4, **settings)
    whole.go()
    parts = Run(digit_policy_dir, tmp_path / "parts", train_steps=2, **settings)
    parts.go()
    with parts.paths.token_gaps.open("a") as file:  # of an update after the checkpoint, which is made again
        file.write(json.dumps({"step": 3, "group": 8, "rollout": 0, "completion_logprob_gaps": [9.0]}) + "\n")
    asyncio.run(_clear_the_way(cast("Any", SimpleNamespace(state=SimpleNamespace(step=2), paths=parts.paths)), None))
    Run(digit_policy_dir, tmp_path / "parts", train_steps=4, resume=True, **settings).go()
    assert gaps_of(parts) == gaps_of(whole)


@pytest.mark.parametrize("fails", [False, True])
def test_the_gaps_of_an_update_are_written_behind_its_sync_and_before_its_checkpoint(
    digit_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    run = Run(digit_policy_dir, tmp_path, train_steps=2, logprob_share=1.0, record_token_logprobs=True, save_every=1)
    seen: list[tuple[str, int, set[int]]] = []

    def see(what: str) -> None:
        seen.append((what, run.trainer.state.step, {step for step, _, _ in gaps_of(run)}))

    sync = run.engine.update_weights

    async def watched_sync(policy: Any) -> Any:
        see("sync")
        if fails and run.trainer.state.step == 2:
            raise OSError("the server is gone")
        return await sync(policy)

    def watched_save(*args: Any, **kwargs: Any) -> Path:
        see("save")
        return save_checkpoint(*args, **kwargs)

    monkeypatch.setattr(run.engine, "update_weights", watched_sync)
    monkeypatch.setattr("ludic.train.trainer.save_checkpoint", watched_save)
    with pytest.raises(OSError, match="gone") if fails else contextlib.nullcontext():
        run.go()
    assert seen == [
        ("sync", 0, set()), ("sync", 1, set()), ("save", 1, {1}), ("sync", 2, {1}), ("save", 2, {1, 2}),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["2≠3 so", "🙂🙃", "", "plain"])
def test_a_token_inside_a_character_ends_where_it_begins(text: str) -> None:
    wanted = [
        place for place, one in enumerate(text, start=1) for place in [place - 1] * (len(one.encode()) - 1) + [place]
    ]
    assert token_ends(decode, list(text.encode()), text) == wanted


def test_tokens_end_in_the_text_in_order_whatever_bytes_they_are() -> None:
    draw = random.Random(0)
    for _ in range(300):
        token_ids = [draw.choice((0x61, 0xE2, 0x89, 0xA0, 0xF0, 0xFF)) for _ in range(draw.randrange(1, 80))]
        text = decode(token_ids)
        ends = token_ends(decode, token_ids, text)
        assert len(ends) == len(token_ids) and ends == sorted(ends) and ends[-1] == len(text)


def test_long_texts_are_decoded_in_windows() -> None:
    text = "so we have 2≠3 apples and 🙂 " * 40
    token_ids, lengths = list(text.encode()), []

    def watched(ids: Any) -> str:
        lengths.append(len(ids))
        return decode(ids)

    ends = token_ends(watched, token_ids, text)
    assert all(text[:end].encode() == bytes(token_ids[:place]) for place, end in enumerate(ends, 1)
               if not decode(token_ids[:place]).endswith("\ufffd"))  # fmt: skip
    assert max(lengths) < 30 and sum(lengths) < 15 * len(token_ids)

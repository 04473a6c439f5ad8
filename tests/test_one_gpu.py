"""One GPU for server and trainer: how its memory is split, what is said of it, and what is refused."""

import argparse
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config

from ludic.cli import check_engine_arguments
from ludic.config import GRPOConfig
from ludic.doctor import dry_run, machine
from ludic.doctor.memory import GIB, choose_share, given_share, split, training_need
from ludic.run import preparation
from ludic.run.engine import _server_flags
from tests.test_doctor import arguments

SHAPE = Qwen2Config(hidden_size=896, num_hidden_layers=24)
"""Qwen2.5's 0.5B."""


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float, float], None]:
    """One GPU of so many GiB, of which so many are free, and a model of so many billion parameters."""

    def make(total: float, free: float, parameters: float) -> None:
        empty = SimpleNamespace(num_parameters=lambda: int(parameters * 1e9))
        monkeypatch.setattr(dry_run, "model_shape", lambda model, trust: (SHAPE, empty))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * GIB), int(total * GIB)))

    return make


def flags(*more: str) -> argparse.Namespace:
    return arguments("--start-server", *more)


@pytest.mark.parametrize(
    ("total", "free", "trainer", "share"),
    [
        (140, 139, 20, 0.5),  # a large one: half
        (80, 79, 50, 0.27),  # 79 less 55 and 2, of 80
        (24, 23, 12, 0.32),
        (24, 23, 22, 0.0),
        (80, 10, 20, 0.0),  # another program has it
    ],
)
def test_the_server_gets_what_training_leaves_and_at_most_half(
    total: int, free: int, trainer: int, share: float
) -> None:
    assert split(free=free * GIB, total=total * GIB, trainer=trainer * GIB) == share


def test_automatic_micro_batches_are_left_room_for_a_good_budget_where_there_is_any(
    one_gpu: Callable[[float, float, float], None],
) -> None:
    config = GRPOConfig(micro_token_budget=None, max_seq_len=1024)
    one_gpu(48, 47, 0.5)
    small, good = (training_need(flags(), config, on_gpu=True, budget=budget).total for budget in (1024, 16384))
    assert choose_share(flags(), config, free=47 * GIB, total=48 * GIB) == split(
        free=47 * GIB, total=48 * GIB, trainer=good
    )
    assert choose_share(flags(), config, free=19 * GIB, total=20 * GIB) == split(
        free=19 * GIB, total=20 * GIB, trainer=small
    )


def test_a_gpu_that_does_not_hold_both_sides_is_refused_in_one_line_with_both_needs(
    one_gpu: Callable[[float, float, float], None],
) -> None:
    one_gpu(24, 23, 1.5)
    with pytest.raises(ValueError, match=r"23 of 24 GiB free .* training needs about \d+ GiB .* at least 6") as said:
        choose_share(flags(), GRPOConfig(micro_token_budget=2048), free=23 * GIB, total=24 * GIB)
    assert "\n" not in str(said.value) and "--server-memory-share" in str(said.value)


def test_each_of_several_engines_is_counted(one_gpu: Callable[[float, float, float], None]) -> None:
    one_gpu(48, 47, 1.5)
    config = GRPOConfig(micro_token_budget=2048)
    one = choose_share(flags(), config, free=47 * GIB, total=48 * GIB)
    assert one * 48 > 6, "enough for one"
    with pytest.raises(ValueError, match=r"the server at least 2\d:"):
        choose_share(flags("--server-args=--server-engines 4"), config, free=47 * GIB, total=48 * GIB)


def test_the_share_may_be_given_by_either_flag_and_not_by_both() -> None:
    assert given_share(flags()) is None
    assert given_share(flags("--server-memory-share", "0.3")) == 0.3
    assert given_share(flags("--server-args=--gpu_memory_utilization=0.2 --max-num-seqs 8")) == 0.2
    assert given_share(flags("--server-args=--gpu-memory-utilization 0.25")) == 0.25
    with pytest.raises(ValueError, match=r"--server-memory-share 0\.3 contradicts --gpu-memory-utilization"):
        given_share(flags("--server-memory-share", "0.3", "--server-args=--gpu-memory-utilization 0.2"))


@pytest.mark.parametrize("value", ["0", "1", "-0.2", "30", "nan"])
def test_a_share_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"--server-memory-share must be above 0 and below 1"):
        check_engine_arguments(flags(f"--server-memory-share={value}"))
    with pytest.raises(ValueError, match="--server-memory-share is for --start-server, which was not given"):
        check_engine_arguments(arguments("--server-memory-share", "0.3"))


def test_a_run_on_one_gpu_says_the_split_and_starts_its_server_with_it(
    one_gpu: Callable[[float, float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(140, 139, 0.5)
    said: list[str] = []
    monkeypatch.setattr(preparation, "say", said.append)
    args = flags()
    preparation._split_gpu(args, GRPOConfig())
    (line,) = said
    assert "the server takes 0.5 of it (70.0 GiB), training has the other 69.0 GiB" in line
    started = _server_flags(args, 64, False, 0)
    assert started[started.index("--gpu-memory-utilization") + 1] == "0.5"
    assert started[started.index("--weight-transfer-config") + 1] == '{"backend": "ludic_shm"}'


def test_what_the_user_gives_is_kept(
    one_gpu: Callable[[float, float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(140, 139, 0.5)
    said: list[str] = []
    monkeypatch.setattr(preparation, "say", said.append)
    args = flags("--server-args=--gpu-memory-utilization 0.3")
    preparation._split_gpu(args, GRPOConfig())
    assert "takes 0.3 of it" in said[0] and args.server_memory_share is None
    assert _server_flags(args, 64, False, 0).count("--gpu-memory-utilization") == 1


def test_two_gpus_and_a_server_of_somebody_elses_are_left_alone(
    one_gpu: Callable[[float, float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_gpu(140, 139, 0.5)
    said: list[str] = []
    monkeypatch.setattr(preparation, "say", said.append)
    preparation._split_gpu(arguments(), GRPOConfig())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = flags()
    preparation._split_gpu(args, GRPOConfig())
    assert not said and args.server_memory_share is None
    assert "--gpu-memory-utilization" not in _server_flags(args, 64, False, 0)


@pytest.mark.parametrize(
    ("share", "status"), [(None, "ok"), ("0.3", "ok"), ("0.8", "warning"), ("0.93", "failed")], ids=str
)
def test_the_memory_check_counts_the_servers_share(
    one_gpu: Callable[[float, float, float], None], share: str | None, status: str
) -> None:
    one_gpu(80, 79, 0.5)
    args = flags(*([] if share is None else ["--server-memory-share", share]))
    finding = machine.check_memory(args, GRPOConfig(micro_token_budget=16384))
    assert finding.status == status, finding
    assert f"(--server-memory-share {share or 0.5:g})" in finding.found if share is None else share in finding.found

"""A living trainer whose real vLLM server is killed, stopped, and started again by somebody with the base weights.

A run's own server is killed in tests/test_benchmark_commands.py, by the command of this benchmark.
"""

from pathlib import Path

import pytest

from ludic.config import GRPOConfig
from ludic.inference.client.server_process import ServerProcess

server_lost = pytest.importorskip("benchmarks.faults.server_lost")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = GRPOConfig(
    rollouts_per_update=32,
    group_size=8,
    max_seq_len=256,
    max_completion_len=12,
    micro_token_budget=1024,
    learning_rate=1e-3,
    warmup_steps=0,
    logprob_share=1.0,
    eval_limit=0,
    save_every=0,
)


async def test_somebody_elses_lost_server_is_got_back_and_nothing_of_other_weights_is_trained_on(
    digit_server: tuple[ServerProcess, Path], digit_problems: Path, tmp_path: Path
) -> None:
    server, policy = digit_server
    fault = server_lost.Fault
    faults = [
        fault(update=2, phase="between updates", act="killed"),
        fault(update=4, phase="sync", act="stopped"),
        fault(update=6, phase="generation", act="stopped"),
    ]
    rows = await server_lost.inject(
        faults,
        model=policy,
        dataset=digit_problems,
        folder=tmp_path,
        by_hand=True,
        seed=0,
        server=server,
        silent_s=6.0,
        config=CONFIG,
    )
    assert len(rows) == len(faults) + 1
    assert all(row.ok for row in rows), rows

"""The two commands about precision: the parts that they take apart add up, and their tables have the rows that they should."""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import head, logprob_gap
from benchmarks.harness import Record, Records
from ludic.inference.client.server_process import ServerProcess
from ludic.train.attention import packed_attention, prepare_packed_attention
from tests.vllm_helpers import make_tiny_model

ON = {"hardware": "1 x GPU", "versions": {"torch": "2.11"}, "date": "2026-01-02", "command": "python benchmarks/x.py"}


def test_the_table_of_the_head_has_a_row_for_each_product_and_fp32_has_no_gap(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--tokens", "64", "--chunk", "48", "--shapes", "32x97", "--repeats", "1"]
    assert head.main([*small, "--out", str(tmp_path)]) == 0
    bf16, fp32 = Records(tmp_path / "head.jsonl").last()["head"]["rows"]
    assert bf16["gap_mean"] > 1e-3 and fp32["gap_max"] < 1e-5
    table = (tmp_path / "head.md").read_text()
    assert "| 32x97, bf16 " in table and "| 32x97, fp32 " in table


def test_a_shape_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert head.main(["--device", "cpu", "--shapes", "896", "--out", str(tmp_path)]) == 2
    assert "--shapes 896 is not HIDDENxVOCABULARY, as in 896x151936" in capsys.readouterr().err


def _args(model: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(model=model, device="cpu", **more)


def _sequences() -> list[Record]:
    """Two groups with a shared prompt each."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        tokens: list[int] = torch.randint(3, 250, (length,), generator=generator).tolist()
        return tokens

    prompts = [ids(9), ids(30)]
    return [{"prompt": prompt, "completion": ids(length)} for prompt in prompts for length in (12, 25, 1)]


def _mean(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return float(logprob_gap.difference(ones, others)["mean"])


def test_each_part_in_fp32_brings_the_trainer_nearer_to_the_reference_and_all_of_them_to_it(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, tie_word_embeddings=True)
    sequences, exact_model = _sequences(), logprob_gap.load(_args(tmp_path), torch.float32)
    exact = logprob_gap.reference(exact_model, sequences)
    prepare_packed_attention(exact_model)
    assert _mean(logprob_gap.trained(exact_model, sequences, fp32_head=True), exact) < 1e-5

    model = logprob_gap.load(_args(tmp_path), torch.bfloat16)
    prepare_packed_attention(model)
    gaps = []
    for parts in ({}, {"rope": True}, {"rope": True, "attention": True}):
        with logprob_gap.in_fp32(model, **{"rope": False, "attention": False, **parts}):
            gaps.append(logprob_gap.trained(model, sequences, fp32_head=True))
    assert all(_mean(gap, exact) > 1e-3 for gap in gaps)
    assert len({_mean(gap, exact) for gap in gaps}) == 3  # each part changes something
    plain = logprob_gap.trained(model, sequences, fp32_head=True)
    assert _mean(plain, gaps[0]) == 0  # and nothing is left changed
    assert _mean(logprob_gap.trained(model, sequences, fp32_head=False), exact) > 1e-3


def test_rope_and_attention_really_are_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_model(tmp_path, tie_word_embeddings=True)
    model = logprob_gap.load(_args(tmp_path), torch.bfloat16)
    prepare_packed_attention(model)
    seen: list[torch.dtype] = []

    def look(module: Any, query: torch.Tensor, *others: Any, **kwargs: Any) -> Any:
        seen.append(query.dtype)
        return packed_attention(module, query, *others, **kwargs)

    angles: list[torch.dtype] = []
    model.get_submodule("model.rotary_emb").register_forward_hook(lambda _m, _i, out: angles.append(out[0].dtype))
    monkeypatch.setattr("ludic.train.attention.packed_attention", look)
    for rope, attention in ((False, False), (True, False), (True, True)):
        with logprob_gap.in_fp32(model, rope=rope, attention=attention):
            logprob_gap.trained(model, _sequences(), fp32_head=True)
    assert angles == [torch.bfloat16, torch.float32, torch.float32]
    assert seen == [torch.bfloat16] * 4 + [torch.float32] * 2  # two layers each


def test_the_difference_of_two_sides_by_hand() -> None:
    ones, others = [[-1.0, -2.0], [-3.0]], [[-1.5, -1.0], [-3.0]]
    found = logprob_gap.difference([torch.tensor(one) for one in ones], [torch.tensor(one) for one in others])
    assert found == {"mean": 0.5, "p99": pytest.approx(0.99), "max": 1.0, "bias": pytest.approx(-0.5 / 3), "tokens": 3}


def test_the_table_has_a_section_for_each_side(tmp_path: Path) -> None:
    records = Records(tmp_path / "logprob_gap.jsonl")
    records.add("machine", **ON)
    figures = {"mean": 0.02, "p99": 0.1, "max": 0.3, "bias": -0.001, "tokens": 1000}
    sides = ("server", "trainer", "trainer against server")
    rows = [{"side": s, "what": f"what {s} does", **figures} for s in sides]
    speeds = {"bfloat16": 2000.0, "float32": 1500.0}
    records.add("logprob_gap", rows=rows, model="m", samples=8, tokens_per_second=speeds)
    assert logprob_gap.main(["--table", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "logprob_gap.md").read_text()
    assert table.startswith("# The log-prob gap of m, 8 completions, 2026-01-02")
    assert [table.count(f"| what {side} does") for side in sides] == [1, 1, 1]
    assert "| logits in float32  |    1,500 |  0.75 |" in table


@pytest.mark.vllm
@pytest.mark.slow
def test_what_the_server_sampled_has_its_log_probs_of_decoding_and_of_prefill(
    digit_server: tuple[ServerProcess, Path], digit_problems: Path
) -> None:
    server, policy = digit_server
    args = _args(policy, dataset=digit_problems, prompts=3, samples=2, max_tokens=8, repeats=2)
    sequences, speed = asyncio.run(logprob_gap.sample(args, server.base_url))
    assert len(sequences) == 6 and speed > 0
    for one in sequences:
        assert len(one["completion"]) == len(one["decode"]) == len(one["prefill"]) > 0
    decode, prefill = ([torch.tensor(one[way]) for one in sequences] for way in ("decode", "prefill"))
    assert _mean(decode, prefill) < 1e-4  # the server computes in fp32

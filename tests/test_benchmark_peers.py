"""The peers of the benchmarks, as far as they go without TRL and a GPU: their kernels, numbers and the way they end."""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.harness import hash_reward
from benchmarks.parts import Pauses
from benchmarks.peers import common, padded_trainer, trl_async, trl_grpo, trl_shared
from ludic.task.prompts import encode_prompt
from tests.vllm_helpers import make_tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


# -- records and the end of a run ----------------------------------------------------------------------------------------


def test_each_line_is_one_json_object_and_the_first_updates_are_marked_as_warm_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = common.JSONLines("peer", tmp_path / "deep" / "out.jsonl")
    for seconds in (9.0, 8.0, 3.0, 1.0, 2.0):
        lines.update({"step": 1, "seconds": seconds, "sync_s": None, "warm": True})
    lines.summary({"rollouts": 256})
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("warmup") for record in printed] == [True, True, False, False, False, None]
    assert printed[-1]["kind"] == "summary" and printed[-1]["medians"]["seconds"] == 2.0
    assert "sync_s" not in printed[-1]["medians"] and "step" not in printed[-1]["medians"]
    assert printed[-1]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert printed == [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_text().splitlines()]


def test_an_update_without_a_single_measured_step_has_no_medians(capsys: pytest.CaptureFixture[str]) -> None:
    common.JSONLines("peer").summary({})
    assert json.loads(capsys.readouterr().out)["medians"] == {}


def end_of(body: str, *, max_seconds: float, server: str | None = None) -> tuple[int, list[dict[str, Any]], str]:
    """The status, records and standard error of a process that runs `body` to the end."""
    script = f"""
import multiprocessing, threading, time
from benchmarks.peers import common

common.HEALTH_INTERVAL_S, common.HEALTH_FAILURES = 0.1, 2

def main():
{textwrap.indent(textwrap.dedent(body), "    ")}

if __name__ == "__main__":
    common.run_to_the_end(main, common.JSONLines("peer"), max_seconds={max_seconds}, server={server!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "src:.", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_failure_is_printed_with_its_causes_and_ends_the_process_though_a_thread_still_waits() -> None:
    status, records, stderr = end_of(
        """
        threading.Thread(target=time.sleep, args=(300,)).start()
        try:
            int("x")
        except ValueError as error:
            raise RuntimeError("no sync") from error
        """,
        max_seconds=60,
    )
    assert status == 1 and records[0]["kind"] == "error" and "Traceback" in stderr
    assert records[0]["reason"].startswith("RuntimeError: no sync <- ValueError: invalid literal")


def test_a_run_that_hangs_is_ended_at_its_limit_with_its_stacks() -> None:
    status, records, stderr = end_of("time.sleep(300)", max_seconds=0.5)
    assert (
        status == 3 and "not done after 0.5 s" in records[0]["reason"] and "time.sleep(300)" not in records[0]["reason"]
    )
    assert "thread MainThread" in stderr and "in main" in stderr


def test_a_run_ends_when_its_server_dies() -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    probe = HTTPServer(("127.0.0.1", 0), Healthy)
    url = f"http://127.0.0.1:{probe.server_port}"
    probe.server_close()
    # The server lives in the process itself for half a second, so that the watch has seen it healthy.
    status, records, _ = end_of(
        f"""
        from http.server import BaseHTTPRequestHandler, HTTPServer

        class Healthy(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()

        server = HTTPServer(("127.0.0.1", {probe.server_port}), Healthy)
        threading.Timer(1.5, server.shutdown).start()
        server.serve_forever(poll_interval=0.05)
        server.server_close()
        time.sleep(300)
        """,
        max_seconds=60,
        server=url,
    )
    assert status == 3 and "is not healthy any more" in records[0]["reason"]


# -- what the TRL scripts share ------------------------------------------------------------------------------------------


def test_the_reward_of_a_conversation_is_the_checksum_bit_of_its_first_turn() -> None:
    texts = ["18", "20", "The answer is 18."]
    rewards = common.conversation_reward([[{"role": "assistant", "content": text}] for text in texts], prompts=[], x=1)
    assert rewards == [hash_reward(text) for text in texts] and set(rewards) == {0.0, 1.0}


def test_the_clock_counts_from_step_to_step_and_leaves_the_log_at_the_end_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[float] = []

    def parts(seconds: float, metrics: Any) -> dict[str, Any]:
        seen.append(seconds)
        return {"loss": metrics["loss"]}

    clock = trl_shared.UpdateClock(common.JSONLines("peer"), parts)
    now = iter([100.0, 103.0, 104.5])
    clock._now = lambda: next(now)  # type: ignore[method-assign]
    state = SimpleNamespace(global_step=0)
    clock.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step = step
        clock.on_step_end(None, state, None)
        clock.on_log(None, state, None, logs={"loss": 0.123456})
    clock.on_log(None, state, None, logs={"train_runtime": 9.0})
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert seen == [3.0, 1.5] and [record["step"] for record in records] == [1, 2]
    assert records[0]["loss"] == 0.1235


def test_a_clock_that_pauses_waits_for_a_line_and_leaves_the_pause_out_of_what_follows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    asked: list[str] = []

    class Stdin:
        def readline(self) -> str:
            asked.append(capsys.readouterr().out.splitlines()[-1])
            return "\n"

    monkeypatch.setattr(sys, "stdin", Stdin())

    def parts(seconds: float, metrics: Any) -> dict[str, Any]:
        seen.append(seconds)
        return {}

    clock = trl_shared.UpdateClock(common.JSONLines("peer"), parts, Pauses([1]))
    now = iter([100.0, 103.0, 200.0, 201.5])  # the pause lasts from 103 to 200
    clock._now = lambda: next(now)  # type: ignore[method-assign]
    state = SimpleNamespace(global_step=0)
    clock.on_train_begin(None, state, None)
    for step in (1, 2):
        state.global_step = step
        clock.on_step_end(None, state, None)
        clock.on_log(None, state, None, logs={"loss": 1.0})
    assert seen == [3.0, 1.5] and asked == ['{"paused": 1}']


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not Path("/proc").exists(), reason="a process's state is read from /proc")
def test_processes_that_generate_ahead_stand_still_in_a_pause() -> None:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,), daemon=True)
    child.start()
    assert child.pid is not None
    try:
        with trl_shared.children_stopped():
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert state_of(child.pid) == "T"
        os.waitid(os.P_PID, child.pid, os.WCONTINUED | os.WNOWAIT)
        assert state_of(child.pid) != "T"
    finally:
        child.kill()
        child.join()


def test_a_stopwatch_adds_up_a_method_and_leaves_its_answer_alone() -> None:
    watch, owner = trl_shared.Stopwatch(), SimpleNamespace(work=lambda x, *, y: x + y)
    watch.time(owner, "work", "work_s")
    assert owner.work(1, y=2) == 3 and watch.take()["work_s"] >= 0 and watch.take() == {}


def test_a_peer_with_other_prompt_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    dataset = [{"prompt": [{"role": "user", "content": "1 + 1"}]}] * 2

    def same(prompts: list[Any]) -> list[list[int]]:
        return [encode_prompt(tokenizer, prompt) for prompt in prompts]

    trl_shared.require_same_prompts(tokenizer, dataset, same)
    with pytest.raises(ValueError, match="tokenises a prompt as"):
        trl_shared.require_same_prompts(tokenizer, dataset, lambda prompts: [ids[1:] for ids in same(prompts)])


def test_the_parts_of_an_update_of_grpo_trainer_add_up_to_the_whole() -> None:
    metrics = {
        "completions/mean_length": 97.5,
        "completions/clipped_ratio": 0.1,
        "reward": 0.5,
        "frac_reward_zero_std": 0.0,
    }
    spent = {"rollout_s": 2.0, "generation_s": 1.2, "sync_s": 0.2, "reward_s": 0.1}
    parts: dict[str, Any] = trl_grpo.update_parts(3.5, spent, metrics, rollouts=256)
    assert parts["completion_tokens"] == 24960 and parts["logprob_gap_mean"] is None
    assert sum(parts[name] for name in ("generation_s", "sync_s", "reward_s", "prepare_s", "train_s")) == pytest.approx(
        3.5
    )


def test_an_update_of_the_async_trainer_is_scaled_to_the_rollouts_asked_for() -> None:
    metrics = {"batch/samples_per_step": 288.0, "batch/trained_tokens_per_step": 28800.0}
    parts: dict[str, Any] = trl_async.update_parts(9.0, metrics, rollouts=256)
    assert parts["seconds_per_rollouts"] == pytest.approx(8.0) and parts["mean_completion_length"] == 100.0


@pytest.mark.parametrize("parse", [trl_grpo.parse_arguments, trl_async.parse_arguments])
def test_rollouts_that_make_no_whole_groups_are_refused(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(parse(["--model", "m", "--dataset", "d"]), argparse.Namespace)
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--dataset", "d", "--rollouts", "100"])
    assert "--rollouts 100 must be a multiple" in capsys.readouterr().err


# -- the async trainer's replacements ------------------------------------------------------------------------------------


def tiny_tokenizer(folder: Path) -> Any:
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_plain_answer_is_parsed_to_its_text_without_prompt_and_end_of_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    trl_async.add_response_template(tokenizer)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "What is 1 + 1?"}])
    answer = "It is 2.\nSo 2."
    ids = tokenizer.encode(answer, add_special_tokens=False)
    for completion in (ids, [*ids, tokenizer.eos_token_id]):
        assert tokenizer.parse_response(completion, prefix=prompt) == {"role": "assistant", "content": answer}


def test_segments_of_a_shared_prompt_attend_as_separate_sequences_do() -> None:
    """A row of prompt P and completions A and B, B's and A's keys gathered with P's, against the rows PA and PB."""
    torch.manual_seed(0)
    lengths = {"P": 5, "A": 3, "B": 2}
    query, key, value = (torch.randn(10, heads, 8) for heads in (4, 2, 2))
    paths = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 8, 9])
    cu_q, cu_k = torch.tensor([0, 5, 8, 10]), torch.tensor([0, 5, 13, 20])
    row = trl_async.segment_kernel(query, key[paths], value[paths], cu_q, cu_k, 5, 8, softmax_scale=0.3)
    for rows in (list(range(8)), [0, 1, 2, 3, 4, 8, 9]):
        q, k, v = query[rows], key[rows].repeat_interleave(2, dim=1), value[rows].repeat_interleave(2, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
        hidden = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        torch.testing.assert_close(row[rows], expected)
    assert sum(lengths.values()) == len(row)


def test_the_check_of_a_kernel_passes_the_right_one_and_fails_one_aligned_to_the_first_key() -> None:
    def aligned_to_the_first_key(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        outputs = []
        for (q0, q1), (k0, k1) in zip(trl_async.pairs(cu_q), trl_async.pairs(cu_k), strict=True):
            q, k, v = query[None, q0:q1], key[None, k0:k1], value[None, k0:k1]
            out = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=0.125, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    cpu = torch.device("cpu")
    assert trl_async.kernel_error(trl_async.segment_kernel, cpu) < trl_async.MAX_KERNEL_ERROR / 3
    assert trl_async.kernel_error(aligned_to_the_first_key, cpu) > 10 * trl_async.MAX_KERNEL_ERROR
    assert trl_async.choose_kernel(cpu)[1] is trl_async.segment_kernel


@pytest.mark.gpu
def test_a_fast_kernel_is_found_on_the_gpu() -> None:
    name, kernel = trl_async.choose_kernel(torch.device("cuda"))
    assert name.startswith("torch varlen")
    assert trl_async.kernel_error(kernel, torch.device("cuda")) < trl_async.MAX_KERNEL_ERROR


# -- the padded trainer --------------------------------------------------------------------------------------------------


def test_micro_batches_hold_every_sequence_once_within_budget_and_rows() -> None:
    lengths = padded_trainer.gsm8k_like_lengths(200)
    batches = padded_trainer.micro_batches(lengths, token_budget=2048, max_rows=7)
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    assert all(len(batch) * max(batch) <= 2048 and len(batch) <= 7 for batch in batches)
    with pytest.raises(ValueError, match="does not fit the budget of 100"):
        padded_trainer.micro_batches([101], token_budget=100, max_rows=1)


@pytest.mark.parametrize("attention_mask", [False, True])
@pytest.mark.parametrize("prompt_length", [0, 1, 4])
def test_padded_rows_have_the_log_probs_of_each_sequence_alone(prompt_length: int, attention_mask: bool) -> None:
    torch.manual_seed(0)
    model = padded_trainer.make_model("tiny", torch.device("cpu"), gradient_checkpointing=False)
    rows = [torch.randint(100, (n,)) for n in (11, 5, 8)]
    expected = 0.0
    for row in rows:
        logprobs = model(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        expected += logprobs.gather(1, row[1:, None])[max(prompt_length - 1, 0) :].sum().item()
    padded = padded_trainer.sum_logprobs(
        model, padded_trainer.pad(rows), prompt_length=prompt_length, attention_mask=attention_mask
    )
    assert padded.item() == pytest.approx(expected, rel=1e-5)


def test_checkpointing_and_the_cut_into_micro_batches_leave_the_update_alone() -> None:
    lengths = [9, 12, 7, 20]
    after = []
    for max_rows, checkpointing in ((4, False), (1, False), (2, True)):
        torch.manual_seed(0)
        model = padded_trainer.make_model("tiny", torch.device("cpu"), gradient_checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(1)
        tokens = {n: torch.randint(100, (n,), generator=generator) for n in lengths}
        batches = [
            padded_trainer.pad([tokens[n] for n in rows])
            for rows in padded_trainer.micro_batches(lengths, token_budget=1000, max_rows=max_rows)
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        padded_trainer.update(model, optimizer, batches, prompt_length=2, attention_mask=False)
        after.append(model.model.layers[0].mlp.down_proj.weight.detach().clone())
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[0], after[2], rtol=1e-4, atol=1e-6)


def test_a_sequence_with_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="has none to train on after a prompt of 9"):
        padded_trainer.run("tiny", [20, 9], device="cpu", prompt_length=9)


def test_the_padded_trainer_prints_its_figures_of_real_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = tmp_path / "lengths.json"
    lengths.write_text("[30, 20, 10]")
    padded_trainer.main(
        ["--device", "cpu", "--shape", "tiny", "--lengths", str(lengths), "--max-rows", "2", "--passes", "1"]
    )
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 60 and record["padded_tokens"] == 2 * 30 + 10 and record["micro_batches"] == 2
    assert record["mfu"] == pytest.approx(
        6 * record["parameters"] * record["tokens_per_s"] / padded_trainer.H200_BF16_FLOPS
    )
    assert record["peak_gib"] == 0.0 and record["settings"]["shape"] == "tiny"

"""The recorder of log-probs over stand-ins for both of vLLM's samplers; the real ones are in test_vllm_integration.py."""

import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ludic.inference.wire import RECORDED_PREFIX
from ludic.inference.worker import vllm_logprobs
from ludic.inference.worker.vllm_logprobs import LogprobRecorder, picked, recording_problem, scored, start_recording

VOCAB = 50
KEY, OTHER = (RECORDED_PREFIX + digit * 32 for digit in "ab")


def internal(key: str, member: int | None = None) -> str:
    """The id that vLLM makes of a request's."""
    return f"{key}-1a2b3c4d" if member is None else f"{member}_{key}-1a2b3c4d"


def step(recorder: LogprobRecorder, *rows: tuple[str, int, int, float], discarded: tuple[bool, ...] = ()) -> None:
    """One sampling step of rows (id, tokens before, token, log-prob)."""
    ids, lengths, tokens, logprobs = zip(*rows, strict=True)
    dropped = np.array(discarded or [False] * len(rows))
    where = recorder.rows(list(ids), np.array(lengths, np.int32), dropped)
    if where is not None:
        values = torch.tensor(logprobs, dtype=torch.float32).view(torch.int32)
        recorder.keep(where, torch.stack((torch.tensor(tokens, dtype=torch.int32), values)))


def taken(recorder: LogprobRecorder, key: str, prompt_length: int, *lengths: int) -> list[Any]:
    entries = recorder.take(key, prompt_length, list(lengths))
    return [
        None if one is None else (np.frombuffer(one[0], np.int32).tolist(), np.frombuffer(one[1], np.float32).tolist())
        for one in entries
    ]


def is_empty(recorder: LogprobRecorder) -> bool:
    return recorder.sizes() == {"requests": 0, "members": 0, "steps": 0, "table_bytes": 8}


# --- the recorder -----------------------------------------------------------------------------------------------------


def test_members_of_a_group_come_back_apart_in_their_order_and_nothing_stays() -> None:
    recorder = LogprobRecorder()
    step(recorder, (internal(KEY, 1), 4, 11, -1.0), ("chat-7", 9, 12, -9.0), (internal(KEY, 0), 4, 13, -2.0))
    step(recorder, (internal(KEY, 0), 5, 14, -3.0))
    assert taken(recorder, KEY, 4, 2, 1) == [([13, 14], [-2.0, -3.0]), ([11], [-1.0])]
    assert is_empty(recorder)
    assert taken(recorder, KEY, 4, 2, 1) == [None, None]


def test_a_batch_without_a_marked_request_is_not_recorded() -> None:
    recorder = LogprobRecorder()
    ids = ["chat-7", f"cmpl-{KEY}", RECORDED_PREFIX + "short"]
    assert recorder.rows(ids, np.array([3, 3, 3]), np.zeros(3, bool)) is None
    assert is_empty(recorder)


def test_what_vllm_discards_while_a_prompt_is_prefilled_in_parts_is_no_token() -> None:
    recorder = LogprobRecorder()
    step(recorder, (internal(KEY), 2, 40, -9.0), discarded=(True,))
    step(recorder, (internal(KEY), 4, 41, -9.0), (internal(OTHER), 7, 5, -0.5), discarded=(True, False))
    step(recorder, (internal(KEY), 6, 11, -1.0), (internal(OTHER), 8, 6, -0.25))
    assert taken(recorder, KEY, 6, 1) == [([11], [-1.0])]
    assert taken(recorder, OTHER, 7, 2) == [([5, 6], [-0.5, -0.25])]


def test_a_token_that_a_preempted_request_samples_again_replaces_the_lost_one() -> None:
    recorder = LogprobRecorder()
    for position, token, logprob in ((3, 11, -1.0), (4, 12, -2.0), (5, 13, -3.0)):
        step(recorder, (internal(KEY), position, token, logprob))
    step(recorder, (internal(KEY), 4, 40, -9.0), discarded=(True,))  # prefilled again, in two parts
    step(recorder, (internal(KEY), 5, 23, -4.0))
    assert taken(recorder, KEY, 3, 3) == [([11, 12, 23], [-1.0, -2.0, -4.0])]


def test_what_was_sampled_past_the_end_is_left_over() -> None:
    recorder = LogprobRecorder()
    for position in range(3, 8):
        step(recorder, (internal(KEY), position, position, -1.0))
    assert taken(recorder, KEY, 3, 4) == [([3, 4, 5, 6], [-1.0] * 4)]


def test_a_gap_shows_as_an_id_that_no_token_has() -> None:
    recorder = LogprobRecorder()
    step(recorder, (internal(KEY), 3, 11, -1.0))
    step(recorder, (internal(KEY), 5, 13, -3.0))
    ((ids, _),) = taken(recorder, KEY, 3, 3)
    assert ids == [11, -1, 13]


def test_a_request_that_was_not_recorded_from_its_start_is_not_known() -> None:
    recorder = LogprobRecorder()
    step(recorder, (internal(KEY), 5, 11, -1.0))
    assert taken(recorder, KEY, 3, 3) == [None]


def test_a_line_that_was_given_back_holds_nothing_of_its_last_owner() -> None:
    recorder = LogprobRecorder()
    step(recorder, (internal(KEY), 3, 11, -1.0), (internal(OTHER), 3, 21, -1.0))
    recorder.forget(OTHER)
    third = RECORDED_PREFIX + "c" * 32
    step(recorder, (internal(KEY), 4, 12, -1.0), (internal(third), 3, 31, -1.0))
    assert taken(recorder, third, 3, 2)[0][0] == [31, -1]
    assert taken(recorder, KEY, 3, 2) == [([11, 12], [-1.0, -1.0])]


def test_many_long_requests_that_come_and_go_are_all_recorded() -> None:
    recorder, random = LogprobRecorder(), np.random.default_rng(0)
    running: dict[str, tuple[int, int, list[int]]] = {}
    done = 0
    for number in range(900):
        if number < 600:
            running[f"{RECORDED_PREFIX}{number:032x}"] = (int(random.integers(1, 9)), int(random.integers(1, 300)), [])
        rows = []
        for key, (prompt, _, tokens) in running.items():
            rows.append((internal(key), prompt + len(tokens), int(random.integers(VOCAB)), -float(len(tokens))))
            tokens.append(rows[-1][2])
        if rows:
            step(recorder, *rows)
        for key, (prompt, length, tokens) in list(running.items()):
            if len(tokens) == length:
                assert taken(recorder, key, prompt, length) == [(tokens, [-float(i) for i in range(length)])]
                del running[key]
                done += 1
    assert done == 600 and is_empty(recorder)


class Copied:
    """A CUDA event: how often it was waited for, and whether the copy is done."""

    def __init__(self, *, done: bool) -> None:
        self.done, self.waited = done, 0

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited, self.done = self.waited + 1, True


def test_a_request_waits_for_its_own_steps_and_not_for_what_the_device_does_now() -> None:
    recorder = LogprobRecorder()
    events = [Copied(done=False) for _ in range(3)]
    for position, event in enumerate(events, 3):
        where = recorder.rows([internal(KEY), internal(OTHER)], np.array([position, position]), np.zeros(2, bool))
        assert where is not None
        packed = torch.tensor([[position, 40 + position], [0, 0]], dtype=torch.int32)
        recorder._steps.append(vllm_logprobs._Step(packed, event, where))  # type: ignore[arg-type]
    assert taken(recorder, KEY, 3, 2) == [([3, 4], [0.0, 0.0])]
    assert [event.waited for event in events] == [1, 1, 0] and recorder.sizes()["steps"] == 1
    third = RECORDED_PREFIX + "c" * 32
    step(recorder, (internal(third), 3, 31, 0.0), (internal(OTHER), 6, 46, 0.0))  # takes over the line of KEY
    assert taken(recorder, OTHER, 3, 4) == [([43, 44, 45, 46], [0.0] * 4)]
    assert taken(recorder, third, 3, 2)[0][0] == [31, -1]
    assert is_empty(recorder)


def test_what_nobody_takes_is_dropped_after_a_while_but_not_what_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ludic.inference.worker.vllm_logprobs.time.monotonic", lambda: now)
    recorder = LogprobRecorder()
    step(recorder, (internal(KEY), 3, 11, -1.0), (internal(OTHER), 3, 21, -1.0))
    now += vllm_logprobs.MAX_AGE_S + 1  # a long pause in which nothing was sampled
    step(recorder, (internal(KEY), 4, 12, -2.0))
    assert recorder.sizes()["requests"] == 1
    assert taken(recorder, KEY, 3, 2) == [([11, 12], [-1.0, -2.0])]


# --- vLLM's samplers --------------------------------------------------------------------------------------------------


class FirstSampler:
    """The older sampler: a greedy sample over it, and log-probs of the last call at hand for the test."""

    def __init__(self) -> None:
        self.topk_topp_sampler = SimpleNamespace(forward=self.forward)

    def forward(self, logits: torch.Tensor, k: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        return logits.argmax(-1).int(), logits.log_softmax(-1)


class SecondSampler:
    """The newer sampler: calls its own `sample`, as vLLM's does."""

    def __init__(self) -> None:
        self.returned: list[bool] = []

    def sample(self, logits: torch.Tensor, *, return_logprobs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.returned.append(return_logprobs)
        return logits.argmax(-1), logits

    def __call__(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return self.sample(logits, return_logprobs=False)[0]


@dataclass
class SecondBatch:
    req_ids: list[str]
    num_reqs: int
    seq_lens_cpu_upper_bound: torch.Tensor
    prefill_len_np: Any


class SecondRunner:
    def __init__(self) -> None:
        self.sampler = SecondSampler()

    def sample(self, hidden_states: torch.Tensor, input_batch: SecondBatch, grammar: Any) -> torch.Tensor:
        return self.sampler(hidden_states, input_batch)


for fake, place in ((FirstSampler, vllm_logprobs._SAMPLER_V1), (SecondSampler, vllm_logprobs._SAMPLER_V2)):
    fake.__module__, _, fake.__qualname__ = place.rpartition(".")


def logits_of(*tokens: int) -> torch.Tensor:
    logits = torch.linspace(-1, 1, VOCAB * len(tokens)).view(len(tokens), VOCAB).clone()
    logits[range(len(tokens)), list(tokens)] = 3.0
    return logits


def logprob(logits: torch.Tensor, token: int) -> float:
    return float(logits.log_softmax(-1)[token])


def first_runner() -> SimpleNamespace:
    return SimpleNamespace(
        sampler=FirstSampler(),
        input_batch=SimpleNamespace(req_ids=[internal(KEY, 0), "chat-7", internal(KEY, 1)]),
        optimistic_seq_lens_cpu=torch.tensor([4, 9, 2, 0, 0], dtype=torch.int32),
        discard_request_mask=SimpleNamespace(np=np.array([False, False, True, False])),
    )


def test_the_older_runners_samples_are_recorded_for_its_batch() -> None:
    runner, recorder = first_runner(), LogprobRecorder()
    start_recording(runner, recorder)
    first = logits_of(5, 6, 7)
    assert runner.sampler.topk_topp_sampler.forward(first, None)[0].tolist() == [5, 6, 7]
    runner.optimistic_seq_lens_cpu += 2  # vLLM keeps these arrays, and changes its list of ids in place
    runner.discard_request_mask.np[:] = False
    runner.input_batch.req_ids.pop(1)
    runner.optimistic_seq_lens_cpu[:2] = torch.tensor([5, 4])
    second = logits_of(8, 9)
    runner.sampler.topk_topp_sampler.forward(second, None)
    runner.sampler.topk_topp_sampler.forward(logits_of(1, 1, 1, 1), None)  # a profiling run: another number of rows
    assert taken(recorder, KEY, 4, 2)[0] == (
        [5, 8], [pytest.approx(logprob(first[0], 5)), pytest.approx(logprob(second[0], 8))]
    )  # fmt: skip


def second_batch(ids: list[str], num_tokens: list[int], prefill: list[int]) -> SecondBatch:
    return SecondBatch(
        req_ids=ids,
        num_reqs=len(ids),
        seq_lens_cpu_upper_bound=torch.tensor([*num_tokens, 0, 0], dtype=torch.int32),
        prefill_len_np=np.array(prefill),
    )


def test_the_newer_runners_samples_are_recorded_for_its_batch() -> None:
    runner, recorder = SecondRunner(), LogprobRecorder()
    sampler = runner.sampler
    start_recording(runner, recorder)
    first, second = logits_of(5, 6, 7), logits_of(8, 9)
    ids = [internal(KEY, 0), "chat-7", internal(KEY, 1)]
    assert runner.sample(first, second_batch(ids, [4, 9, 2], [4, 1, 4]), None).tolist() == [5, 6, 7]
    runner.sample(second, second_batch([ids[0], ids[2]], [5, 4], [4, 4]), None)
    sampler(logits_of(1), None)  # a profiling run
    runner.sample(logits_of(1), second_batch(["chat-7"], [10], [1]), None)
    assert sampler.returned == [True, True, False, False], "only a recorded step is asked for its last logits"
    assert taken(recorder, KEY, 4, 2, 1) == [
        ([5, 8], [pytest.approx(logprob(first[0], 5)), pytest.approx(logprob(second[0], 8))]),
        ([9], [pytest.approx(logprob(second[1], 9))]),
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"world_size": 2}, "spread over several workers"),
        ({"data_parallel_size": 2}, "spread over several workers"),
        ({"speculative_config": "ngram"}, "speculative decoding"),
        ({"logprobs_mode": "raw_logprobs"}, "logprobs-mode is raw_logprobs"),
    ],
    ids=str,
)
@pytest.mark.parametrize("runner", [first_runner, SecondRunner])
def test_a_setting_that_cannot_be_recorded_is_said_in_a_few_words(
    runner: Any, change: dict[str, Any], said: str
) -> None:
    problem = recording_problem(runner(), config_with(**change))
    assert bool(problem) == bool(said) and said in problem


def config_with(**change: Any) -> SimpleNamespace:
    values: dict[str, Any] = {"world_size": 1, "data_parallel_size": 1, "speculative_config": None}
    everything = SimpleNamespace(**{**values, "logprobs_mode": "processed_logprobs", **change})
    everything.parallel_config = everything.model_config = everything
    return everything


def test_a_sampler_or_runner_of_another_make_is_not_recorded() -> None:
    runner: Any = first_runner()
    del runner.discard_request_mask
    assert recording_problem(runner, config_with()).endswith("has no discard_request_mask")
    runner = SecondRunner()
    runner.sampler.sample = lambda logits: logits
    assert recording_problem(runner, config_with()).endswith("has no return_logprobs")
    runner.sampler = SimpleNamespace()
    assert recording_problem(runner, config_with()) == "the sampler is types.SimpleNamespace"


def test_log_probs_of_logits_in_any_dtype_are_taken_in_float32() -> None:
    ids = torch.tensor([3, 49])
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
        packed = scored(logits, ids)
        wanted = torch.log_softmax(logits.float(), -1)
        assert packed[0].tolist() == [3, 49]
        assert torch.equal(packed[1].view(torch.float32), torch.stack((wanted[0, 3], wanted[1, 49])))
        assert torch.equal(picked(wanted, ids.int()), packed)


TRITON = """
import torch
from ludic.inference.worker.logprob_kernel import scored_by_triton

generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    wide = (torch.randn(5, 10_048, generator=generator) * 4).to(dtype)
    logits = wide[:, :10_000]
    logits[1, 4096:8192] = float("-inf")
    logits[2, 1:] = float("-inf")
    ids = torch.tensor([3, 9_999, 0, 5000, 77])
    wanted = logits.log_softmax(-1, dtype=torch.float32).gather(1, ids[:, None])[:, 0]
    for one in (logits, logits.T.contiguous().T):
        packed = scored_by_triton(one, ids)
        assert packed[0, :5].tolist() == ids.tolist()
        torch.testing.assert_close(packed[1].view(torch.float32)[:5], wanted, atol=1e-5, rtol=0)
"""


def test_the_kernel_for_the_gpu_computes_the_same_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

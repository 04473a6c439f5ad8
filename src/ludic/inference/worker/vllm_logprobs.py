"""The sampled tokens' log-probs, kept inside vLLM's worker until a request is done, instead of sent with every token.

vLLM slices, encodes, decodes and collects log-probs request by request and token by token, in Python. `LogprobRecorder`
keeps them as they leave the sampler: per step one small tensor that is copied to the host without waiting for the device,
later scattered into a table of one line per request. A finished request takes its line in one call.

An entry is filed under its position in the sequence, which is known on the host before the token is. So a position that is
sampled again (a preempted request lost its last token) replaces what was there, and a token that was sampled past the end
(the next step had begun) is left over. The token ids are recorded too: the caller compares them with the completion's, and
believes no log-prob where they differ.

It fits both model runners of vLLM 0.26 to 0.33 on one device; `recording_problem` names what it does not fit. Greedy requests
must not be recorded. Nothing here imports vLLM.
"""

import inspect
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ludic.inference.wire import RECORDED_PREFIX

Ints = npt.NDArray[np.int64]

MAX_AGE_S = 600.0
"""What was not added to for so long was left behind by a front end that is gone, or by an abort."""

_RECORDED_ID = re.compile(rf"(?:(\d+)_)?({RECORDED_PREFIX}[0-9a-f]{{32}})(?:-.*)?")
"""vLLM appends random characters to a request's id, and puts the member's number before it where n > 1."""
_SAMPLER_V1 = "vllm.v1.sample.sampler.Sampler"
_SAMPLER_V2 = "vllm.v1.worker.gpu.sample.sampler.Sampler"
# What is read at every step, where an error would end the engine: looked for before anything is recorded.
_USED_V1 = ("optimistic_seq_lens_cpu", "discard_request_mask")
_USED_V2 = ("req_ids", "num_reqs", "seq_lens_cpu_upper_bound", "prefill_len_np")


@dataclass(frozen=True, slots=True)
class Rows:
    """The R rows of a step's batch that are recorded, and where they go."""

    rows: Ints  # [R] rows of the batch
    slots: Ints  # [R] lines of the table; line 0 belongs to no request
    positions: Ints  # [R] position of the sampled token in its sequence


@dataclass(slots=True)
class _Step:
    packed: torch.Tensor  # [2, at least B] int32 on the host: token ids, and the bits of their float32 log-probs
    copied: "torch.cuda.Event | None"
    where: Rows


class LogprobRecorder:
    """What was sampled for the requests whose id has the prefix `RECORDED_PREFIX`, until they are taken or forgotten."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self._composition: list[str] | None = None
        self._composition_slots: Ints = np.zeros(0, np.int64)
        self._next_sweep = time.monotonic() + MAX_AGE_S
        self._members: dict[str, dict[int, str]] = {}
        """key of a request -> member -> vLLM's id"""
        self._slot_of: dict[str, int] = {}
        """vLLM's id -> line of the table"""
        self._clear()

    def _clear(self) -> None:
        self._table: npt.NDArray[np.int32] = np.full((2, 1, 1), -1, np.int32)
        """[2, lines, tokens]: token ids, and the bits of their log-probs; -1 where nothing was written"""
        self._touched = np.zeros(1)
        self._free: list[int] = []

    # --- while it samples ---------------------------------------------------------------------------------------------

    def rows(self, req_ids: list[str], num_tokens: npt.NDArray[Any], discarded: npt.NDArray[np.bool_]) -> Rows | None:
        """Which rows of a step are to be recorded; None if there are none.

        `req_ids` [B] is vLLM's, `num_tokens` [B] the tokens that each row's sequence has before the new one, `discarded`
        [B] the rows whose sampled token vLLM drops.
        """
        if req_ids != self._composition:
            self._compose(req_ids)
        if not self._slot_of:
            return None
        rows = np.flatnonzero((self._composition_slots > 0) & ~discarded)
        if not rows.size:
            return None
        return Rows(rows, self._composition_slots[rows], num_tokens[rows])

    def keep(self, where: Rows, packed: torch.Tensor) -> None:
        """File a step's `packed` ([2, at least B] int32: ids, and log-probs' bits). It is read later, not waited for."""
        copied = None
        if packed.is_cuda:
            packed = packed.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record()
        self._steps.append(_Step(packed, copied, where))
        self._touched[where.slots] = time.monotonic()
        while self._steps and (self._steps[0].copied is None or self._steps[0].copied.query()):
            self._file(self._steps.popleft())

    def _file(self, step: _Step) -> None:
        where = step.where
        longest = int(where.positions.max()) + 1
        lines, length = self._table.shape[1:]
        if longest > length:
            self._grow(lines, max(longest, 2 * length, 64))
        self._table[:, where.slots, where.positions] = step.packed.numpy()[:, where.rows]

    def _compose(self, req_ids: list[str]) -> None:
        """Find the lines of another batch's rows. Mostly the batch is that of the step before."""
        now = time.monotonic()
        if now > self._next_sweep:
            self._sweep(now, set(req_ids))
        self._composition = list(req_ids)
        known = self._slot_of
        self._composition_slots = np.array([known.get(one) or self._slot(one) for one in req_ids], np.int64)

    def _sweep(self, now: float, running: set[str]) -> None:
        self._next_sweep = now + MAX_AGE_S / 10
        for key, members in list(self._members.items()):
            left = running.isdisjoint(members.values())
            if left and all(now - self._touched[self._slot_of[req_id]] > MAX_AGE_S for req_id in members.values()):
                self.forget(key)

    def _slot(self, req_id: str) -> int:
        """The line of a request that was not seen before; 0 if it is not to be recorded."""
        if RECORDED_PREFIX not in req_id or (match := _RECORDED_ID.fullmatch(req_id)) is None:
            return 0
        if not self._free:
            lines, length = self._table.shape[1:]
            self._grow(max(2 * lines, 64), length)
            self._free.extend(range(self._table.shape[1] - 1, lines - 1, -1))
        slot = self._free.pop()
        self._table[0, slot] = -1
        self._touched[slot] = time.monotonic()
        self._slot_of[req_id] = slot
        self._members.setdefault(match[2], {})[int(match[1] or 0)] = req_id
        return slot

    def _grow(self, lines: int, length: int) -> None:
        old_lines, old_length = self._table.shape[1:]
        table = np.full((2, lines, length), -1, np.int32)
        table[:, :old_lines, :old_length] = self._table
        self._table = table
        self._touched = np.concatenate((self._touched, np.zeros(lines - old_lines)))

    # --- when a request is done ---------------------------------------------------------------------------------------

    def take(self, key: str, prompt_length: int, lengths: Sequence[int]) -> list[tuple[bytes, bytes] | None]:
        """The ids (int32) and log-probs (float32) of a request's members, `lengths[i]` each, and forget the request.

        A member of whose first token nothing was recorded is None; a later gap has the id -1. It waits only for the steps
        that sampled these tokens, and they are done by the time that vLLM has given the tokens out.
        """
        req_ids = self._members.get(key, {})
        slots = [self._slot_of[req_ids[member]] if member in req_ids else 0 for member in range(len(lengths))]
        wanted: Ints = np.zeros(self._table.shape[1], np.int64)
        wanted[slots] = [prompt_length + length for length in lengths]
        wanted[0] = 0  # the line of no request
        needed = [(step.where.positions < wanted[step.where.slots]).any() for step in self._steps]
        for _ in range(max((count for count, is_needed in enumerate(needed, 1) if is_needed), default=0)):
            step = self._steps.popleft()
            if step.copied is not None:
                step.copied.synchronize()
            self._file(step)
        taken: list[tuple[bytes, bytes] | None] = []
        for slot, length in zip(slots, lengths, strict=True):
            ids, logprobs = self._table[:, slot, prompt_length : prompt_length + length]
            is_known = slot > 0 and len(ids) == length and (ids[:1] >= 0).all()
            taken.append((ids.tobytes(), logprobs.tobytes()) if is_known else None)
        self.forget(key)
        return taken

    def forget(self, key: str) -> None:
        """Drop what is held for a request, if anything."""
        slots = [self._slot_of.pop(req_id) for req_id in self._members.pop(key, {}).values()]
        if not slots:
            return
        self._composition = None
        for step in self._steps:
            where = step.where
            step.where = Rows(where.rows, np.where(np.isin(where.slots, slots), 0, where.slots), where.positions)
        if self._slot_of:
            self._free.extend(slots)
        else:  # no request is left: release the memory too
            self._steps.clear()
            self._clear()

    def sizes(self) -> dict[str, int]:
        """What is held: requests, their members, steps that are not filed yet, bytes of the table."""
        return {
            "requests": len(self._members),
            "members": len(self._slot_of),
            "steps": len(self._steps),
            "table_bytes": self._table.nbytes,
        }


# --- vLLM's samplers --------------------------------------------------------------------------------------------------


def recording_problem(runner: Any, vllm_config: Any) -> str:
    """Why a vLLM model runner's log-probs cannot be recorded, "" if they can."""
    parallel = vllm_config.parallel_config
    if parallel.world_size > 1 or parallel.data_parallel_size > 1:
        return "the model is spread over several workers"
    if vllm_config.speculative_config is not None:
        return "speculative decoding samples several tokens in a step"
    if str(vllm_config.model_config.logprobs_mode) != "processed_logprobs":
        return f"--logprobs-mode is {vllm_config.model_config.logprobs_mode}, not processed_logprobs"
    name = _sampler_name(runner)
    if name == _SAMPLER_V1:
        missing = [one for one in ("input_batch", *_USED_V1) if not hasattr(runner, one)]
    elif name == _SAMPLER_V2:
        batch = inspect.signature(runner.sample).parameters.get("input_batch")
        fields = getattr(batch and batch.annotation, "__dataclass_fields__", ())
        missing = [one for one in _USED_V2 if one not in fields]
        missing += {"return_logprobs"} - inspect.signature(runner.sampler.sample).parameters.keys()
    else:
        return f"the sampler is {name}"
    return f"this version's model runner has no {', '.join(missing)}" if missing else ""


def _sampler_name(runner: Any) -> str:
    kind = type(runner.sampler)
    return f"{kind.__module__}.{kind.__qualname__}"


def start_recording(runner: Any, recorder: LogprobRecorder) -> None:
    """Let a runner for which `recording_problem` has nothing to say file what it samples with `recorder`."""
    if _sampler_name(runner) == _SAMPLER_V2:
        _record_v2(runner, recorder)
    else:
        _record_v1(runner, recorder)


def _record_v1(runner: Any, recorder: LogprobRecorder) -> None:
    """The older runner, whose sampler computes all log-probs [B, V] at every step in this mode.

    Between a step's forward pass and its sampling the runner's batch stands still, with asynchronous scheduling too.
    """
    sampler = runner.sampler.topk_topp_sampler
    sample = sampler.forward

    def recording(logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        sampled, logprobs = sample(logits, *args, **kwargs)
        req_ids = runner.input_batch.req_ids
        count = len(req_ids)
        if logprobs is not None and count == sampled.shape[0]:
            num_tokens = runner.optimistic_seq_lens_cpu.numpy()[:count]
            where = recorder.rows(req_ids, num_tokens, runner.discard_request_mask.np[:count])
            if where is not None:
                recorder.keep(where, picked(logprobs, sampled))
        return sampled, logprobs

    sampler.forward = recording


def _record_v2(runner: Any, recorder: LogprobRecorder) -> None:
    """The newer runner, whose sampler returns the logits [B, V] that it sampled from.

    `runner.sample` has the batch and calls `runner.sampler`, whose `sample` has the logits. A profiling run calls the
    sampler without the runner's `sample`, and is not recorded.
    """
    runner_sample, sampler_sample = runner.sample, runner.sampler.sample
    current: list[Rows] = []

    def recording_batch(hidden_states: torch.Tensor, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        # Exact without speculative decoding, which is what the bound allows for; padded to a CUDA graph's size.
        num_tokens = input_batch.seq_lens_cpu_upper_bound.numpy()[: input_batch.num_reqs]
        where = recorder.rows(input_batch.req_ids, num_tokens, num_tokens < input_batch.prefill_len_np)
        current[:] = [] if where is None else [where]
        try:
            return runner_sample(hidden_states, input_batch, *args, **kwargs)
        finally:
            current.clear()

    def recording_logits(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not current:
            return sampler_sample(*args, **kwargs)  # type: ignore[no-any-return]
        # Otherwise a fused kernel may apply top-k and top-p without showing what is left of the logits.
        kwargs["return_logprobs"] = True
        sampled, logits = sampler_sample(*args, **kwargs)
        recorder.keep(current[0], scored(logits, sampled))
        return sampled, logits

    runner.sample, runner.sampler.sample = recording_batch, recording_logits


def warm_up(device: torch.device, vocab_size: int, dtypes: Sequence[torch.dtype]) -> None:
    """Compile what `scored` runs on a GPU before a step has to wait for it."""
    if device.type == "cuda":
        for dtype in dict.fromkeys(dtypes):
            scored(
                torch.zeros(2, vocab_size, dtype=dtype, device=device), torch.zeros(2, dtype=torch.long, device=device)
            )


def picked(logprobs: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[2, B] int32: `token_ids` [B], and the bits of their log-probs out of float32 `logprobs` [B, V]."""
    token_ids = token_ids.long()
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    return torch.stack((token_ids.int(), chosen.float().view(torch.int32)))


def scored(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[2, at least B] int32: `token_ids` [B], and the bits of their log-probs under `logits` [B, V], in float32."""
    if logits.is_cuda:
        from ludic.inference.worker.logprob_kernel import scored_by_triton

        return scored_by_triton(logits, token_ids)
    return picked(logits.log_softmax(-1, dtype=torch.float32), token_ids)

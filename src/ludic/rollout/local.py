"""An inference engine in this process: transformers' models, on a copy of the policy's weights.

It stands behind the same interface as the vLLM client, for the demo, for tests and for people without a server. Calls are
served in the order in which they were made: one task collects the concurrent `generate` calls, sorts them by prompt length,
and has them decoded in batches (`local_decoding`), in one worker thread. A weight update takes its place between them. Which
version a completion has is a matter of the order of the calls and never of timing, and the same calls in the same order
repeat bit for bit: every completion draws from its seed and its place in the group.

What it leaves out: paged attention, continuous batching, several devices and sharded models. That is what the server is for.
"""

import asyncio
import copy
import dataclasses
import itertools
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from typing import Self

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.rollout.local_decoding import Row, decode, prepare_decoding
from ludic.task.pretrained import load_model, loading
from ludic.task.rope import pin_rope
from ludic.types import Completion, SamplingParams

MAX_BATCH_SIZE = 256
"""Rows that are decoded at once, by default."""
_QUIET_TURNS = 3
"""Turns of the event loop without a new request after which every ready caller is taken to have submitted."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Request:
    """One `generate` call: what it asked for and what it has been given so far."""

    rows: list[Row]
    future: "asyncio.Future[list[Completion]]"
    completions: dict[int, Completion] = field(default_factory=dict)

    def deliver(self, member: int, completion: Completion) -> None:
        self.completions[member] = completion
        if len(self.completions) == len(self.rows) and not self.future.done():
            self.future.set_result([self.completions[row.member] for row in self.rows])


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class _WeightUpdate:
    """One `update_weights` call, and its place among the requests."""

    policy: Policy
    future: "asyncio.Future[WeightSyncReport]"


class LocalEngine:
    """`InferenceEngine` that decodes in this process, on the CPU or one GPU, with its own copy of the weights.

    Works for decoder-only transformers models with an attention cache. Greedy decoding (`temperature` 0) reports the
    log-probabilities of the untempered distribution, as vLLM's processed log-probs do; with `top_p` below 1 they are
    those of the renormalised nucleus.

    Args:
        model: the initial policy. It is copied, and the original is not touched.
        eos_token_ids: every token that ends a completion. May be empty: then completions end at `max_tokens`.
        device: where to decode; the model's own device if None.
        dtype: what to decode in; the model's own dtype if None.
        max_batch_size: rows decoded at once. More is quicker until the cache no longer fits.
        copy_model: False hands over `model` itself, for a caller that has no other use for it.

    Raises:
        ValueError: this process cannot decode models of this architecture; or a token or a size is impossible.

    Example:
        >>> engine = LocalEngine.from_pretrained("checkpoints_sums/step_10")
        >>> completions = await engine.generate(prompt, num_completions=8, sampling=SamplingParams(seed=1))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        copy_model: bool = True,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._vocab_size: int = model.config.get_text_config().vocab_size
        for token_id in eos_token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"token id {token_id} is outside the model's vocabulary of {self._vocab_size} tokens")
        self._model = _prepare(copy.deepcopy(model) if copy_model else model, device=device, dtype=dtype)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._max_batch_size = max_batch_size
        self._max_context: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._policy_version = 0
        self._weights_proven = True
        self._queue: list[_Request | _WeightUpdate] = []
        self._task: asyncio.Task[None] | None = None
        # One thread of our own: a pool would give each thread its own OpenMP workers, which compete for the same cores.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ludic-local-engine")
        self._closed = False

    overlaps_training = False
    """Generation and training share one device: running them at the same time gains nothing."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        eos_token_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = MAX_BATCH_SIZE,
        trust_remote_code: bool = False,
        context_len: int | None = None,
    ) -> Self:
        """Load a model folder (or hub name). Without `eos_token_ids` its tokenizer and generation config say them.

        With `context_len`, RoPE that depends on length is pinned to it, as the trainer's is to its `--max-seq-len`.
        """
        model = load_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
        if context_len is not None:
            pin_rope(model, context_len)
        if eos_token_ids is None:
            with loading(path, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            configured = model.generation_config.eos_token_id
            found = configured if isinstance(configured, list) else [configured]
            eos_token_ids = sorted({t for t in (*found, tokenizer.eos_token_id) if t is not None})
        return cls(
            model,
            eos_token_ids=eos_token_ids,
            device=device,
            dtype=dtype,
            max_batch_size=max_batch_size,
            copy_model=False,
        )

    @property
    def policy_version(self) -> int:
        """The version of the weights in use; 0 until the first `update_weights`."""
        return self._policy_version

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """Draw `num_completions` completions of one prompt, batched with whatever else is asked for meanwhile.

        Raises:
            ValueError: the request is impossible (empty prompt, unknown token, longer than the context).
            RuntimeError: the engine is closed, or the model's output is not a number.
        """
        self._check_request(prompt_token_ids, num_completions, sampling)
        prompt = tuple(prompt_token_ids)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        members = range(num_completions)
        rows = [Row(prompt=prompt, sampling=sampling, seed=seed, member=member) for member in members]
        future: asyncio.Future[list[Completion]] = asyncio.get_running_loop().create_future()
        self._submit(_Request(rows=rows, future=future))
        return await future

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        """Take over the policy's weights, and prove it: every tensor must be equal afterwards.

        May be called while requests are queued or in flight. Those that came before it are finished first, with the
        weights that they came under; those that come after it, even before it is done, have the new ones.

        Raises:
            ValueError: the two models do not hold the same tensors in the same shapes. Nothing has been copied.
            RuntimeError: a tensor differs after the copy (also when it holds NaN), or the engine was closed. Until an
                update succeeds, the engine holds weights that belong to no version, and refuses to generate.
        """
        future: asyncio.Future[WeightSyncReport] = asyncio.get_running_loop().create_future()
        start_s = time.perf_counter()
        self._submit(_WeightUpdate(policy=policy, future=future))
        report = await future
        seconds = time.perf_counter() - start_s
        phases_s = {"wait": seconds - report.seconds, **report.phases_s}
        return dataclasses.replace(report, seconds=seconds, phases_s=phases_s)

    def counts(self) -> dict[str, float]:
        """Nothing can be lost between two halves of one process."""
        return {}

    async def aclose(self) -> None:
        """Finish the batch in hand, refuse what is still queued, and let go of the thread and the weights."""
        if self._closed:
            return
        self._closed = True
        _refuse(self._queue, RuntimeError("this LocalEngine was closed"))
        self._queue = []
        if self._task is not None:
            await asyncio.wait([self._task])
        self._executor.shutdown()
        torch.nn.Module.to(self._model, device="meta")

    def _submit(self, call: _Request | _WeightUpdate) -> None:
        if self._closed:
            raise RuntimeError("this LocalEngine is closed")
        self._queue.append(call)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())

    def _check_request(self, prompt: Sequence[int], num_completions: int, sampling: SamplingParams) -> None:
        if num_completions < 1:
            raise ValueError(f"num_completions must be at least 1, not {num_completions}")
        if not prompt:
            raise ValueError("the prompt is empty; a completion needs at least one token to follow")
        if not 0 <= min(prompt) <= max(prompt) < self._vocab_size:
            raise ValueError(
                f"prompt token ids must be in 0 to {self._vocab_size - 1}, not {min(prompt)} to {max(prompt)}; "
                "was it encoded with another model's tokenizer?"
            )
        if self._max_context is not None and len(prompt) + sampling.max_tokens > self._max_context:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens {sampling.max_tokens} exceed the model's context of "
                f"{self._max_context} tokens; lower max_tokens to {self._max_context - len(prompt)} or less"
            )

    async def _drain(self) -> None:
        """Serve calls until none is left. A wave is all that was asked for until now or until the next weight update."""
        taken: list[_Request | _WeightUpdate] = []
        try:
            await self._let_callers_submit()
            while self._queue:
                taken = list(itertools.takewhile(lambda call: isinstance(call, _Request), self._queue))
                taken = taken or self._queue[:1]
                self._queue = self._queue[len(taken) :]
                if isinstance(taken[0], _WeightUpdate):
                    await self._apply(taken[0])
                else:
                    await self._decode_wave([call for call in taken if isinstance(call, _Request)])
                await self._let_callers_submit()
        finally:  # Nobody may wait for ever if this task is cancelled.
            _refuse([*taken, *self._queue], RuntimeError("this LocalEngine stopped before the completions were drawn"))
            self._queue = []

    async def _let_callers_submit(self) -> None:
        """Yield until no caller that could run has anything to add, so that batches do not depend on timing."""
        quiet = 0
        while quiet < _QUIET_TURNS:
            before = len(self._queue)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._queue) == before else 0

    async def _decode_wave(self, wave: Sequence[_Request]) -> None:
        """Decode the requests in the worker thread, batch by batch, and hand the completions to those who asked."""
        waiting = [(request, row) for request in wave for row in request.rows]
        waiting.sort(key=lambda pair: len(pair[1].prompt))  # Stable: ties stay in the order of submission.
        for first in range(0, len(waiting), self._max_batch_size):
            batch = [pair for pair in waiting[first : first + self._max_batch_size] if not pair[0].future.done()]
            if not batch:
                continue
            rows = [row for _, row in batch]
            decoding = asyncio.get_running_loop().run_in_executor(self._executor, self._decode_rows, rows)
            await asyncio.wait([decoding])
            failure = decoding.exception()
            if failure is not None:  # Every caller of the batch gets it; the next batch may well succeed.
                _refuse([request for request, _ in batch], failure)
                continue
            for (request, row), completion in zip(batch, decoding.result(), strict=True):
                request.deliver(row.member, completion)

    def _decode_rows(self, rows: list[Row]) -> list[Completion]:
        if self._closed:
            raise RuntimeError("this LocalEngine was closed")
        if not self._weights_proven:
            raise RuntimeError("the last weight sync failed, so the engine's weights belong to no version; sync again")
        return decode(self._model, rows, eos_token_ids=self._eos_token_ids, policy_version=self._policy_version)

    async def _apply(self, update: _WeightUpdate) -> None:
        """Take over the weights on the policy's thread, and tell the caller how it went."""
        if update.future.done():  # The caller has given up before its turn came.
            return
        reading = asyncio.ensure_future(update.policy.read(self._take_over))
        await asyncio.wait([reading])
        failure = reading.exception()
        if failure is not None:
            _refuse([update], failure)
        elif not update.future.done():
            update.future.set_result(reading.result())

    def _take_over(self, model: torch.nn.Module, policy_version: int) -> WeightSyncReport:
        _check_same_tensors(_named_tensors(self._model), _named_tensors(model))
        self._weights_proven = False
        report = _hand_over(model, self._model, policy_version)
        self._weights_proven, self._policy_version = True, policy_version
        return report


def _refuse(calls: Sequence[_Request | _WeightUpdate], error: BaseException) -> None:
    """Give `error` to every caller that still waits."""
    for call in calls:
        if not call.future.done():
            call.future.set_exception(error)


def _prepare(
    model: PreTrainedModel, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Make a model ours: eval mode, no gradients, attention for decoding."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    model.eval()
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    if dtype is not None:
        # Only what a checkpoint would hold: buffers that are computed (rotary frequencies) keep their precision.
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)  # In place, so that tied weights stay tied.
    prepare_decoding(model)
    return model


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers under all their names: tied weights appear once for each."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@torch.no_grad()
def _hand_over(source: torch.nn.Module, target: PreTrainedModel, policy_version: int) -> WeightSyncReport:
    """Copy every tensor of `source` into `target` in place, cast to its dtype, and compare all of them after."""
    start_s = time.perf_counter()
    ours, theirs = _named_tensors(target), _named_tensors(source)
    for name, tensor in ours.items():
        tensor.copy_(theirs[name])
    copied_s = time.perf_counter()
    # Only after all copies: where one side ties two names and the other does not, a later copy undoes an earlier one.
    for name, tensor in ours.items():
        if not torch.equal(tensor, theirs[name].to(device=tensor.device, dtype=tensor.dtype)):
            raise RuntimeError(
                f"weight sync to policy version {policy_version} did not take: {name} differs after the copy "
                "(NaN in the trained weights, or tied on one side only)"
            )
    unique = {id(tensor): tensor for tensor in ours.values()}.values()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in unique)
    return WeightSyncReport(
        policy_version=policy_version,
        num_tensors=len(unique),
        num_bytes=num_bytes,
        seconds=time.perf_counter() - start_s,
        proof=f"all {len(unique)} tensors ({num_bytes} bytes) equal element by element, 0 differ",
        phases_s={"send": copied_s - start_s, "proof": time.perf_counter() - copied_s},
    )


def _check_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or extra:
        raise ValueError(
            f"the trained model is not the engine's model: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unknown ({', '.join(extra[:3])}); give the engine a copy of the model that is trained"
        )
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{name} has shape {list(theirs[name].shape)} in the trained model and {list(tensor.shape)} in the "
                "engine; give the engine a copy of the model that is trained"
            )

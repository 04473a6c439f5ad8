"""An inference engine in this process: transformers' own `generate`, on a copy of the policy's weights.

It stands behind the same interface as the vLLM client, for the demo, for tests and for people without a server. It
keeps *its own copy* of the weights, so that training cannot change a policy in the middle of a completion, and
`update_weights` is a real hand-over that can fail and is proven, as it is with a server.

Concurrent `generate` calls are collected and decoded together: one background task lets every caller that is ready
submit, sorts what has come by prompt length, and decodes it in batches, in one worker thread. Three things keep that
quick without leaving `generate`:

- each distinct prompt is prefilled once, and its cache rows are copied to all its completions;
- decoding pauses whenever half of the rows have ended, drops those, and goes on with the rest;
- a token is chosen, and its log-probability kept, inside one logits processor, so that no `[B, V]` scores are stored.

Every completion has random numbers of its own, drawn from its seed and its place in the group. What it says therefore
does not depend on the batch that it was in, except through floating-point rounding; and the same calls, made in the
same order, repeat bit for bit.

What it leaves out: paged attention, continuous batching across waves, several devices and sharded models. That is what
the server is for.
"""

import asyncio
import copy
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from typing import Self

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from ludic.inference.engine import WeightSyncReport
from ludic.inference.local_decoding import Choose, Decoding, Pause, Row
from ludic.types import Completion, SamplingParams

_QUIET_TURNS = 3
"""Turns of the event loop without a new request after which every ready caller is taken to have submitted."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Request:
    """One `generate` call: what it asked for and what it has been given so far."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    future: "asyncio.Future[list[Completion]]"
    completions: dict[int, Completion] = field(default_factory=dict)
    num_completions: int

    def row(self, member: int) -> Row:
        return Row(prompt=self.prompt, sampling=self.sampling, seed=self.seed, member=member)

    def deliver(self, member: int, completion: Completion) -> None:
        self.completions[member] = completion
        if len(self.completions) == self.num_completions and not self.future.done():
            self.future.set_result([self.completions[index] for index in range(self.num_completions)])


class LocalEngine:
    """`InferenceEngine` that decodes in this process, on the CPU or one GPU, with its own copy of the weights.

    Works for decoder-only transformers models with an attention cache. Greedy decoding (`temperature` 0) reports the
    log-probabilities of the untempered distribution, as vLLM's processed log-probs do; with `top_p` below 1 they are
    those of the renormalised nucleus.

    Args:
        model: the initial policy. It is copied, and the original is not touched.
        eos_token_ids: every token that ends a completion. May be empty: then completions end at `max_tokens`.
        pad_token_id: fills up shorter prompts on the left; attention never sees it.
        device: where to decode; the model's own device if None.
        dtype: what to decode in; the model's own dtype if None.
        max_batch_size: rows decoded at once. More is quicker until the cache no longer fits.
        copy_model: False hands over `model` itself, for a caller that has no other use for it.

    Example:
        >>> engine = LocalEngine.from_pretrained("checkpoints_gsm8k/step_10")
        >>> completions = await engine.generate(prompt, num_completions=8, sampling=SamplingParams(seed=1))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 256,
        copy_model: bool = True,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._vocab_size: int = model.config.get_text_config().vocab_size
        for token_id in (*eos_token_ids, pad_token_id):
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"token id {token_id} is outside the model's vocabulary of {self._vocab_size} tokens")
        self._model = _prepare(copy.deepcopy(model) if copy_model else model, device=device, dtype=dtype)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._max_batch_size = max_batch_size
        self._max_context: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._policy_version = 0
        self._weights_proven = True
        self._queue: list[_Request] = []
        self._task: asyncio.Task[None] | None = None
        self._weights_lock = asyncio.Lock()
        # One thread of our own: a pool would give each thread its own OpenMP workers, which compete for the same cores.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ludic-local-engine")
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        eos_token_ids: Sequence[int] | None = None,
        pad_token_id: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_batch_size: int = 256,
    ) -> Self:
        """Load a model folder (or hub name). Stop and padding tokens come from its tokenizer and generation config."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype if dtype is not None else "auto")
        if eos_token_ids is None or pad_token_id is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
            if eos_token_ids is None:
                configured = model.generation_config.eos_token_id
                found = configured if isinstance(configured, list) else [configured]
                eos_token_ids = sorted({t for t in (*found, tokenizer.eos_token_id) if t is not None})
            if pad_token_id is None:
                pad_token_id = tokenizer.pad_token_id
                if pad_token_id is None:
                    pad_token_id = eos_token_ids[0] if eos_token_ids else 0
        return cls(
            model,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
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
        self._check_open()
        self._check_request(prompt_token_ids, num_completions, sampling)
        request = _Request(
            prompt=tuple(prompt_token_ids),
            sampling=sampling,
            seed=sampling.seed if sampling.seed is not None else secrets.randbits(63),
            future=asyncio.get_running_loop().create_future(),
            num_completions=num_completions,
        )
        self._queue.append(request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await request.future

    async def update_weights(self, model: torch.nn.Module, *, policy_version: int) -> WeightSyncReport:
        """Take over `model`'s weights between two batches, and prove it: every tensor must be equal afterwards.

        Requests that are queued but not begun are decoded with the new weights, and stamped so.

        Raises:
            ValueError: the two models do not hold the same tensors in the same shapes. Nothing has been copied.
            RuntimeError: a tensor differs after the copy (also when it holds NaN). Until an update succeeds, the engine
                holds weights that belong to no version, and refuses to generate.
        """
        self._check_open()
        _check_same_tensors(_named_tensors(self._model), _named_tensors(model))
        start_s = time.perf_counter()
        loop = asyncio.get_running_loop()
        async with self._weights_lock:
            waited_s = time.perf_counter() - start_s
            self._weights_proven = False
            report = await loop.run_in_executor(self._executor, _hand_over, model, self._model, policy_version)
            self._weights_proven = True
            self._policy_version = policy_version
        return WeightSyncReport(
            policy_version=policy_version,
            num_tensors=report.num_tensors,
            num_bytes=report.num_bytes,
            seconds=time.perf_counter() - start_s,
            proof=report.proof,
            phases_s={"wait": waited_s, **report.phases_s},
        )

    async def aclose(self) -> None:
        """Finish the batch in hand, refuse what is still queued, and let go of the thread and the weights."""
        if self._closed:
            return
        self._closed = True
        _refuse(self._queue, RuntimeError("this LocalEngine was closed"))
        if self._task is not None:
            await asyncio.wait([self._task])
        async with self._weights_lock:  # A weight update may still be under way.
            self._executor.shutdown()
        torch.nn.Module.to(self._model, device="meta")

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this LocalEngine is closed")

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
        """Decode until the queue is empty. A wave is everything that was asked for by the time it begins."""
        wave: list[_Request] = []
        try:
            await self._let_callers_submit()
            while self._queue:
                wave, self._queue = self._queue, []
                members = [(request, member) for request in wave for member in range(request.num_completions)]
                members.sort(key=lambda pair: len(pair[0].prompt))  # Stable: ties stay in the order of submission.
                for first in range(0, len(members), self._max_batch_size):
                    batch = members[first : first + self._max_batch_size]
                    await self._decode([pair for pair in batch if not pair[0].future.done()])
                await self._let_callers_submit()
        finally:  # Nobody may wait for ever if this task is cancelled.
            _refuse([*wave, *self._queue], RuntimeError("this LocalEngine stopped before the completions were drawn"))
            self._queue = []

    async def _let_callers_submit(self) -> None:
        """Yield until no caller that could run has anything to add, so that batches do not depend on timing."""
        quiet = 0
        while quiet < _QUIET_TURNS:
            before = len(self._queue)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._queue) == before else 0

    async def _decode(self, members: list[tuple[_Request, int]]) -> None:
        """Decode one batch in the worker thread and hand the completions to the requests that they belong to."""
        async with self._weights_lock:
            if self._closed:
                _refuse([request for request, _ in members], RuntimeError("this LocalEngine was closed"))
                return
            if not members:
                return
            if not self._weights_proven:
                error = RuntimeError(
                    "the last weight sync failed, so the engine's weights belong to no version; sync again"
                )
                _refuse([request for request, _ in members], error)
                return
            version = self._policy_version
            rows = [request.row(member) for request, member in members]
            decoded = asyncio.get_running_loop().run_in_executor(self._executor, self._decode_rows, rows, version)
            await asyncio.wait([decoded])
        failure = decoded.exception()
        if failure is not None:  # Every caller of the batch gets it; the next batch may well succeed.
            _refuse([request for request, _ in members], failure)
            return
        for (request, member), completion in zip(members, decoded.result(), strict=True):
            request.deliver(member, completion)

    @torch.inference_mode()
    def _decode_rows(self, rows: list[Row], policy_version: int) -> list[Completion]:
        """Decode rows together, dropping those that have ended each time that half of them have."""
        device = self._model.device
        state = Decoding(rows, eos_token_ids=self._eos_token_ids, device=device)
        input_ids, attention_mask, cache = self._prefill(rows)
        while True:
            config = GenerationConfig(
                max_new_tokens=int(state.remaining()), do_sample=False, use_cache=True, disable_compile=True
            )
            num_before = input_ids.shape[1]
            output = self._model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([Choose(state)]),
                stopping_criteria=StoppingCriteriaList([Pause(state)]),
            )
            keep = state.drop_finished()
            if keep.numel() == 0:
                break
            attention_mask = torch.nn.functional.pad(attention_mask, (0, output.shape[1] - num_before), value=1)[keep]
            input_ids = output[keep]
            cache.batch_select_indices(keep)
        return state.completions(policy_version)

    def _prefill(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Left-padded ids and mask `[B, P]`, and a cache of the first P - 1 positions, computed once a prompt."""
        device = self._model.device
        places: dict[tuple[int, ...], int] = {}
        index = torch.tensor([places.setdefault(row.prompt, len(places)) for row in rows], device=device)
        width = max(map(len, places))
        padded = [[self._pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in places]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in places]
        input_ids = torch.tensor(padded, device=device)
        attention_mask = torch.tensor(mask, device=device)
        cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        if width > 1:
            self._model(
                input_ids=input_ids[:, :-1],
                attention_mask=attention_mask[:, :-1],
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_select_indices(index)
        return input_ids[index], attention_mask[index], cache


def _refuse(requests: Sequence[_Request], error: BaseException) -> None:
    """Give `error` to every caller that still waits."""
    for request in requests:
        if not request.future.done():
            request.future.set_exception(error)


def _prepare(
    model: PreTrainedModel, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Make a model ours: eval mode, no gradients, plain attention, no generation defaults of its own."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
    model.eval()
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    if dtype is not None:
        _cast(model, dtype)
    model.set_attn_implementation("sdpa")
    # An empty one: a folder's generation_config.json must not override what a caller asks for.
    model.generation_config = GenerationConfig()
    return model


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what a checkpoint would hold. Buffers that are computed (rotary frequencies) keep their precision."""
    stored = model.state_dict(keep_vars=True)
    for tensor in stored.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)  # In place, so that tied weights stay tied.


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

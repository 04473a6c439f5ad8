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
import hashlib
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
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ludic.inference.engine import WeightSyncReport
from ludic.types import Completion, SamplingParams

_LARGEST_UNIFORM = 1.0 - 2.0**-24
"""Just under 1, so that a uniform times the total probability stays under the total after rounding."""
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

    def deliver(self, member: int, completion: Completion) -> None:
        self.completions[member] = completion
        if len(self.completions) == self.num_completions and not self.future.done():
            self.future.set_result([self.completions[index] for index in range(self.num_completions)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One completion to be decoded: member `member` of `request`."""

    request: _Request
    member: int


class LocalEngine:
    """`InferenceEngine` that decodes in this process, on the CPU or one GPU, with its own copy of the weights.

    Works for decoder-only transformers models with an attention cache. Greedy decoding (`temperature` 0) reports the
    log-probabilities of the untempered distribution, as vLLM's processed log-probs do; with `top_p` below 1 they are
    those of the renormalised nucleus.

    Args:
        model: the initial policy; copied, and not touched again.
        eos_token_ids: every token that ends a completion. May be empty: then completions end at `max_tokens`.
        pad_token_id: fills up shorter prompts on the left; attention never sees it.
        device: where to decode; the model's own device if None.
        dtype: what to decode in; the model's own dtype if None.
        max_batch_size: rows decoded at once. More is quicker until the cache no longer fits.
        copy_model: False hands `model` itself over, for a caller that keeps no other use of it.

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
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        for token_id in (*eos_token_ids, pad_token_id):
            if not 0 <= token_id < self._vocab_size:
                raise ValueError(f"token id {token_id} is outside the model's vocabulary of {self._vocab_size} tokens")
        self._model = _prepare(copy.deepcopy(model) if copy_model else model, device=device, dtype=dtype)
        self._eos_token_ids = frozenset(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._max_batch_size = max_batch_size
        self._max_context: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._policy_version = 0
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
            RuntimeError: a tensor differs after the copy (also when it holds NaN).
        """
        self._check_open()
        start_s = time.perf_counter()
        loop = asyncio.get_running_loop()
        async with self._weights_lock:
            waited_s = time.perf_counter() - start_s
            report = await loop.run_in_executor(self._executor, _hand_over, model, self._model, policy_version)
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
        self._model = self._model.to("meta")

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
                rows = [_Row(request=request, member=i) for request in wave for i in range(request.num_completions)]
                rows.sort(key=lambda row: len(row.request.prompt))  # Stable: ties stay in the order of submission.
                for first in range(0, len(rows), self._max_batch_size):
                    batch = rows[first : first + self._max_batch_size]
                    await self._decode([row for row in batch if not row.request.future.done()])
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

    async def _decode(self, rows: list[_Row]) -> None:
        """Decode one batch in the worker thread and hand the completions to the requests that they belong to."""
        async with self._weights_lock:
            if self._closed:
                _refuse([row.request for row in rows], RuntimeError("this LocalEngine was closed"))
                return
            if not rows:
                return
            version = self._policy_version
            decoded = asyncio.get_running_loop().run_in_executor(self._executor, self._decode_rows, rows, version)
            await asyncio.wait([decoded])
        error = decoded.exception()
        if error is not None:  # Every caller of the batch gets it; the next batch may well succeed.
            _refuse([row.request for row in rows], error)
            return
        for row, completion in zip(rows, decoded.result(), strict=True):
            row.request.deliver(row.member, completion)

    @torch.inference_mode()
    def _decode_rows(self, rows: list[_Row], policy_version: int) -> list[Completion]:
        """Decode rows together, dropping those that have ended each time that half of them have."""
        device = self._model.device
        state = _Decoding(rows, eos_token_ids=self._eos_token_ids, device=device)
        input_ids, attention_mask, cache = self._prefill(rows)
        while True:
            config = GenerationConfig(
                max_new_tokens=int(state.remaining()), do_sample=False, use_cache=True, disable_compile=True
            )
            num_before = input_ids.shape[1]
            output = self._model.generate(
                input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Choose(state)]),
                stopping_criteria=StoppingCriteriaList([_Pause(state)]),
            )
            keep = state.drop_finished()
            if keep.numel() == 0:
                break
            attention_mask = torch.nn.functional.pad(attention_mask, (0, output.shape[1] - num_before), value=1)[keep]
            input_ids = output[keep]
            cache.batch_select_indices(keep)
        return state.completions(policy_version)

    def _prefill(self, rows: list[_Row]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
        """Left-padded ids and mask `[B, P]`, and a cache of the first P - 1 positions, computed once a prompt."""
        device = self._model.device
        places: dict[tuple[int, ...], int] = {}
        index = torch.tensor([places.setdefault(row.request.prompt, len(places)) for row in rows], device=device)
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


class _Decoding:
    """What is known of a batch while it is decoded. B rows, M tokens at most, A of the rows still active."""

    def __init__(self, rows: Sequence[_Row], *, eos_token_ids: frozenset[int], device: torch.device) -> None:
        sampling = [row.request.sampling for row in rows]
        max_tokens = max(params.max_tokens for params in sampling)
        self.eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self.max_tokens = torch.tensor([params.max_tokens for params in sampling], device=device)
        temperature = torch.tensor([params.temperature for params in sampling], dtype=torch.float32)
        self.greedy = (temperature == 0).to(device)
        self.temperature = torch.where(temperature == 0, 1.0, temperature).to(device)
        self.top_p = torch.tensor([params.top_p for params in sampling], dtype=torch.float32, device=device)
        self.any_sampled = any(params.temperature > 0 for params in sampling)
        self.any_tempered = any(params.temperature not in (0.0, 1.0) for params in sampling)
        self.any_top_p = any(params.temperature > 0 and params.top_p < 1 for params in sampling)
        self.uniforms = _uniforms(rows, max_tokens).to(device) if self.any_sampled else None
        self.tokens = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(rows), max_tokens, dtype=torch.float32, device=device)
        self.lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.active = torch.arange(len(rows), device=device)
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)  # [A], in the order of `active`
        self.step = 0

    def remaining(self) -> int:
        """Tokens that the longest active row may still have."""
        return int(self.max_tokens[self.active].max()) - self.step

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each active row `[A]`, from `logits` [A, V] (overwritten); keeps it and its log-prob."""
        rows = self.active
        if self.any_tempered:
            logits /= self.temperature[rows, None]
        if self.any_top_p:
            top_p = torch.where(self.greedy[rows], 1.0, self.top_p[rows])
            _keep_nucleus(logits, top_p)
        logprobs = logits.log_softmax(dim=-1)
        if self.uniforms is None:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = _inverse_cdf(logprobs.exp(), self.uniforms[rows, self.step])
            chosen = torch.where(self.greedy[rows], logits.argmax(dim=-1), chosen)
        self.tokens[rows, self.step] = chosen
        self.logprobs[rows, self.step] = logprobs.gather(1, chosen[:, None])[:, 0]
        return chosen

    def advance(self, last_tokens: torch.Tensor) -> torch.Tensor:
        """Note which active rows end with `last_tokens` [A]. True for all when enough have ended to drop them."""
        self.step += 1
        rows = self.active
        stops = torch.isin(last_tokens, self.eos)
        ends = ~self.finished & (stops | (self.step >= self.max_tokens[rows]))
        self.stopped[rows] |= ends & stops
        self.lengths[rows] = torch.where(ends, self.step, self.lengths[rows])
        self.finished |= ends
        # A row is never carried beyond its own limit, where the model may have no more positions.
        full = (self.finished & (self.step >= self.max_tokens[rows])).any()
        return self.finished | full | (2 * self.finished.sum() >= self.finished.numel())

    def drop_finished(self) -> torch.Tensor:
        """Keep only the unfinished rows; their places among those that were active."""
        keep = (~self.finished).nonzero()[:, 0]
        self.active = self.active[keep]
        self.finished = self.finished[keep]
        return keep

    def completions(self, policy_version: int) -> list[Completion]:
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        within = torch.arange(self.tokens.shape[1], device=self.lengths.device) < self.lengths[:, None]
        if not torch.isfinite(self.logprobs[within]).all():
            raise RuntimeError(
                f"the policy (version {policy_version}) gives log-probabilities that are not finite; "
                "its weights have most likely diverged"
            )
        return [
            Completion(
                token_ids=tokens[row][:length],
                logprobs=logprobs[row][:length],
                finish_reason="stop" if stopped[row] else "length",
                policy_version=policy_version,
            )
            for row, length in enumerate(lengths)
        ]


class _Choose(LogitsProcessor):
    """Makes `generate`'s argmax take the token that we have drawn."""

    def __init__(self, state: _Decoding) -> None:
        self._state = state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = self._state.choose(scores)
        scores.zero_().scatter_(1, chosen[:, None], 1.0)
        return scores


class _Pause(StoppingCriteria):
    """Ends rows at a stop token or their own `max_tokens`, and leaves `generate` once half of the rows have ended."""

    def __init__(self, state: _Decoding) -> None:
        self._state = state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.Tensor:
        return self._state.advance(input_ids[:, -1])


def _uniforms(rows: Sequence[_Row], max_tokens: int) -> torch.Tensor:
    """[B, max_tokens] float64 in [0, 1): row by row from (seed, member), whatever else is in the batch."""
    generator = torch.Generator()
    uniforms = torch.empty(len(rows), max_tokens, dtype=torch.float64)
    for place, row in enumerate(rows):
        digest = hashlib.blake2b(f"{row.request.seed}:{row.member}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))
        torch.rand(max_tokens, generator=generator, dtype=torch.float64, out=uniforms[place])
    return uniforms.clamp_(max=_LARGEST_UNIFORM)


def _inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token [A] whose slice of the cumulative distribution of `probs` [A, V] holds each uniform [A].

    The sum runs in float64: over a vocabulary of 150,000 tokens float32 would shift the tail's slices visibly. The
    first entry *above* the uniform is taken, so that a token of probability 0 is never chosen.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def _keep_nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Set to -inf, in place, what is outside the smallest set of tokens with probability `top_p` [A] of [A, V].

    Nucleus sampling: https://arxiv.org/abs/1904.09751. The most likely token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # Probability of all tokens that are more likely
    outside = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    outside[:, 0] = False
    logits.masked_fill_(outside.scatter(1, order, outside), -torch.inf)


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
    _check_same_tensors(ours, theirs)
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

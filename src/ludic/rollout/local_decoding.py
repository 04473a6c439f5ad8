"""How `LocalEngine` decodes one batch: the model is asked for the next token of all rows until the last has ended.

The model, its cache and its masks are transformers'; the loop is ours, because `generate` spends as long on its own
bookkeeping as a small model takes for a token. Two more things keep it quick: each distinct prompt is prefilled once, its
cache rows copied to all its completions; and whenever half of the rows have ended, those are dropped.

A token is drawn from uniforms that belong to the completion and not to the batch. Left out: the queue and the weights,
which are `local`'s, and paged attention and continuous batching, which are a server's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ludic.task.architectures import attention_problem
from ludic.types import Completion, SamplingParams

OTHER_ENGINE = "decode it with a vLLM server (--engine vllm)"
"""What to do about a model that this process cannot decode."""
_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
_DOES_NOT_RUN = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
_LARGEST_UNIFORM = 1.0 - 2.0**-24
"""Just under 1, so that a uniform times the total probability stays under the total after rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One completion to be decoded: its prompt, and everything that its random numbers depend on."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    member: int
    """Its place in the group."""


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    eos_token_ids: frozenset[int],
    policy_version: int,
) -> list[Completion]:
    """Draw one completion for each row, in their order; `policy_version` is what they are stamped with.

    Raises:
        RuntimeError: the model's output is not a number.
    """
    state = Decoding(rows, eos_token_ids=eos_token_ids, device=model.device)
    input_ids, attention_mask, cache = _prefill(model, rows)
    width = attention_mask.shape[1]
    position_ids = attention_mask.sum(dim=-1, keepdim=True) - 1
    attention_mask = pad(attention_mask, (0, state.tokens.shape[1]), value=1)  # what is generated is always seen
    while True:
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask[:, :width],
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        input_ids = state.choose(logits.float())[:, None]
        position_ids = position_ids + 1
        width += 1
        if state.enough_have_ended():
            keep = state.drop_finished()
            if keep.numel() == 0:
                return state.completions(policy_version)
            cache.batch_select_indices(keep)
            input_ids, position_ids, attention_mask = input_ids[keep], position_ids[keep], attention_mask[keep]


def _prefill(model: PreTrainedModel, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Each row's last prompt token [B, 1], the left-padded mask [B, P], and a cache of the first P - 1 positions."""
    device = model.device
    places: dict[tuple[int, ...], int] = {}
    index = torch.tensor([places.setdefault(row.prompt, len(places)) for row in rows], device=device)
    width = max(map(len, places))
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in places]  # any token: attention never sees it
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in places]
    input_ids = torch.tensor(padded, device=device)
    attention_mask = torch.tensor(mask, device=device)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if width > 1:
        model(
            input_ids=input_ids[:, :-1],
            attention_mask=attention_mask[:, :-1],
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(index)
    return input_ids[index, -1:], attention_mask[index], cache


ATTENTION_NAME = "ludic_decoding"


def prepare_decoding(model: PreTrainedModel) -> None:
    """Switch a model to `decoding_attention`, in place; one that takes no attention function keeps its own.

    Raises:
        ValueError: this process cannot decode the model, or would compute another one. Known settings are looked at; what
            else there may be (a state in place of a cache, an architecture that ignores padding) is found by a trial.
    """
    name = type(model).__name__
    problem = attention_problem(model, layers=_LAYERS)
    if problem:
        raise ValueError(f"{name} {problem}; {OTHER_ENGINE}")
    try:
        _set_attention(model)
        gap = _trial_gap(model)
    except torch.OutOfMemoryError:
        raise
    except _DOES_NOT_RUN as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} does not run with the local engine ({reason:.200}); {OTHER_ENGINE}") from error
    if gap > (1e-2 if model.dtype == torch.float32 else 0.5):
        raise ValueError(
            f"{name} computes something else with a cache and padding, which the local engine uses, than without "
            f"(largest difference {gap:.2g} nats); {OTHER_ENGINE}"
        )


def _set_attention(model: PreTrainedModel) -> None:
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, decoding_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation(ATTENTION_NAME)


@torch.inference_mode()
def _trial_gap(model: PreTrainedModel) -> float:
    """How far the log-probs of a completion behind a padded prompt are from those of a plain forward pass; 0 where the
    weights give no finite numbers, which the first request reports."""
    vocabulary: int = model.config.get_text_config().vocab_size
    prompts = [tuple(token % vocabulary for token in range(1, length)) for length in (4, 7)]
    ids = torch.tensor([prompts[0]], device=model.device)
    if not model(input_ids=ids, use_cache=False).logits.isfinite().all():
        return 0.0
    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    rows = [Row(prompt=prompt, sampling=greedy, seed=0, member=0) for prompt in prompts]
    short = decode(model, rows, eos_token_ids=frozenset(), policy_version=0)[0]
    ids = torch.tensor([[*prompts[0], *short.token_ids]], device=model.device)
    logprobs = model(input_ids=ids, use_cache=False).logits[0, len(prompts[0]) - 1 : -1].float().log_softmax(-1)
    return float((logprobs.amax(-1).cpu() - torch.tensor(short.logprobs)).abs().max())


def decoding_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, but for one new token no key is copied for the query heads that share it.

    The H / Hkv query heads of a key head stand in the place of as many query positions, which see the same keys. The
    copies would be a fifth of a small model's time. Query [B, H, T, D], keys and values [B, Hkv, K, D].

    Returns:
        [B, T, H, D], and None for the attention weights.

    Raises:
        ValueError: for a cap of the scores or attention sinks, which sdpa would leave out without a word.
    """
    dropped = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if dropped:
        raise ValueError(f"torch's attention kernels cannot do what its layers ask for: {', '.join(dropped)}")
    batch_size, num_heads, num_tokens, head_dim = query.shape
    num_key_heads = key.shape[1]
    if num_tokens > 1 or num_heads == num_key_heads or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    grouped = query.reshape(batch_size, num_key_heads, num_heads // num_key_heads, head_dim)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch_size, 1, num_heads, value.shape[-1]), None


class Decoding:
    """What is known of a batch while it is decoded. B rows, M tokens at most, A of the rows still active."""

    def __init__(self, rows: Sequence[Row], *, eos_token_ids: frozenset[int], device: torch.device) -> None:
        sampling = [row.sampling for row in rows]
        max_tokens = max(params.max_tokens for params in sampling)
        self.eos = torch.tensor(sorted(eos_token_ids), dtype=torch.long, device=device)
        self.max_tokens = torch.tensor([params.max_tokens for params in sampling], device=device)
        temperature = torch.tensor([params.temperature for params in sampling], dtype=torch.float32)
        self.greedy = (temperature == 0).to(device)
        self.temperature = torch.where(temperature == 0, 1.0, temperature).to(device)
        self.top_p = torch.tensor([params.top_p for params in sampling], dtype=torch.float32, device=device)
        self.any_greedy = any(params.temperature == 0 for params in sampling)
        self.any_tempered = any(params.temperature not in (0.0, 1.0) for params in sampling)
        self.any_top_p = any(params.temperature > 0 and params.top_p < 1 for params in sampling)
        self.with_logprobs = [params.logprobs for params in sampling]
        any_sampled = any(params.temperature > 0 for params in sampling)
        self.uniforms = uniforms_for(rows, max_tokens).to(device) if any_sampled else None
        self.tokens = torch.zeros(len(rows), max_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(rows), max_tokens, dtype=torch.float32, device=device)
        """[B, M]; for rows without `logprobs`, only whether each value is finite is meaningful."""
        self.lengths = torch.zeros(len(rows), dtype=torch.long, device=device)
        self.stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.active = torch.arange(len(rows), device=device)
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)  # [A], in the order of `active`
        self.step = 0

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each active row `[A]`, from `logits` [A, V] (overwritten); notes which rows end with it."""
        rows = self.active
        if self.any_tempered:
            logits /= self.temperature[rows, None]
        if self.any_top_p:
            keep_nucleus(logits, torch.where(self.greedy[rows], 1.0, self.top_p[rows]))
        if self.uniforms is None and not any(self.with_logprobs):  # no distribution is needed, over all the vocabulary
            self.logprobs[rows, self.step], chosen = logits.max(dim=-1)
        else:
            logprobs = logits.log_softmax(dim=-1)
            if self.uniforms is None:
                chosen = logits.argmax(dim=-1)
            else:
                chosen = inverse_cdf(logprobs.exp(), self.uniforms[rows, self.step])
                if self.any_greedy:
                    chosen = torch.where(self.greedy[rows], logits.argmax(dim=-1), chosen)
            self.logprobs[rows, self.step] = logprobs.gather(1, chosen[:, None])[:, 0]
        self.tokens[rows, self.step] = chosen
        self._advance(chosen)
        return chosen

    def _advance(self, chosen: torch.Tensor) -> None:
        self.step += 1
        rows = self.active
        stops = torch.isin(chosen, self.eos)
        ends = ~self.finished & (stops | (self.step >= self.max_tokens[rows]))
        self.stopped[rows] |= ends & stops
        self.lengths[rows] = torch.where(ends, self.step, self.lengths[rows])
        self.finished |= ends

    def enough_have_ended(self) -> bool:
        """Whether it is time to drop rows: half of them have ended, or one is at its own limit.

        A row is never carried beyond its limit, where the model may have no more positions.
        """
        full = (self.finished & (self.step >= self.max_tokens[self.active])).any()
        return bool(full | (2 * self.finished.sum() >= self.finished.numel()))

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
                logprobs=logprobs[row][:length] if self.with_logprobs[row] else None,
                finish_reason="stop" if stopped[row] else "length",
                policy_version=policy_version,
            )
            for row, length in enumerate(lengths)
        ]


def uniforms_for(rows: Sequence[Row], max_tokens: int) -> torch.Tensor:
    """[B, max_tokens] float64 in [0, 1): row by row from (seed, member), whatever else is in the batch."""
    generator = torch.Generator()
    uniforms = torch.empty(len(rows), max_tokens, dtype=torch.float64)
    for place, row in enumerate(rows):
        digest = hashlib.blake2b(f"{row.seed}:{row.member}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))
        torch.rand(max_tokens, generator=generator, dtype=torch.float64, out=uniforms[place])
    return uniforms.clamp_(max=_LARGEST_UNIFORM)


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token [A] whose slice of the cumulative distribution of `probs` [A, V] holds each uniform [A].

    The sum runs in float64: over a vocabulary of 150,000 tokens float32 would shift the tail's slices visibly. The
    first entry *above* the uniform is taken, so that a token of probability 0 is never chosen.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def keep_nucleus(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Set to -inf, in place, what is outside the smallest set of tokens with probability `top_p` [A] of [A, V].

    Nucleus sampling: https://arxiv.org/abs/1904.09751. The most likely token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # Probability of all tokens that are more likely
    outside = (before >= top_p[:, None]) & (top_p[:, None] < 1)
    outside[:, 0] = False
    logits.masked_fill_(outside.scatter(1, order, outside), -torch.inf)

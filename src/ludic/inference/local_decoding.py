"""How `LocalEngine` chooses tokens: the state of one batch while transformers' `generate` decodes it.

`generate` itself only runs the model and takes the argmax of scores. `Choose` makes that argmax the token that was drawn
here, from uniforms that belong to the completion and not to the batch; `Pause` says which rows have ended. What is not
here: the model, the cache and the queue, which are `local`'s.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ludic.types import Completion, SamplingParams

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
        self.any_sampled = any(params.temperature > 0 for params in sampling)
        self.any_tempered = any(params.temperature not in (0.0, 1.0) for params in sampling)
        self.any_top_p = any(params.temperature > 0 and params.top_p < 1 for params in sampling)
        self.uniforms = uniforms_for(rows, max_tokens).to(device) if self.any_sampled else None
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
            keep_nucleus(logits, top_p)
        logprobs = logits.log_softmax(dim=-1)
        if self.uniforms is None:
            chosen = logits.argmax(dim=-1)
        else:
            chosen = inverse_cdf(logprobs.exp(), self.uniforms[rows, self.step])
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


class Choose(LogitsProcessor):
    """Makes `generate`'s argmax take the token that we have drawn."""

    def __init__(self, state: Decoding) -> None:
        self._state = state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = self._state.choose(scores)
        scores.zero_().scatter_(1, chosen[:, None], 1.0)
        return scores


class Pause(StoppingCriteria):
    """Ends rows at a stop token or their own `max_tokens`, and leaves `generate` once half of the rows have ended."""

    def __init__(self, state: Decoding) -> None:
        self._state = state

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.Tensor:
        return self._state.advance(input_ids[:, -1])


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

"""Every piece of data that flows between the rooms of ludic, in the order in which one sample meets them.

    sample -> chat messages -> prompt_token_ids -> Completion -> Rollout in a RolloutGroup
           -> TrainingSample -> MicroBatch -> optimizer

All of them are frozen: a stage makes a new value, it never edits the one it was given. Shapes stand beside the fields;
P is a prompt's length in tokens, C a completion's, G the group size, L = P + C, T the tokens of a packed row, S the
segments that it is cut into, K the keys that they see and N the tokens that are trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:  # parsers and graders, and the worker processes of the latter, do without torch
    import torch

FinishReason = Literal["stop", "length"]
"""`stop`: the model ended by itself, with a stop token. `length`: it was cut off at `max_tokens` (truncated)."""


class ChatMessage(TypedDict):
    """One turn of a chat, as chat templates take it. Many templates know no `tool`."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. `temperature` 0 is greedy; `top_p` 1 draws from the whole distribution.

    Example:
        >>> SamplingParams(temperature=1.0, max_tokens=512, seed=7)
        SamplingParams(temperature=1.0, top_p=1.0, max_tokens=512, seed=7, logprobs=True)
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    logprobs: bool = True
    """Whether the engine returns the log-probabilities of the sampled tokens. Generation is faster without."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (0 is greedy), not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a conversation after its prompt: `assistant` is the model, every other role the environment."""

    role: Literal["system", "user", "assistant", "tool"]
    text: str
    """Without special tokens."""
    num_tokens: int
    """Of the completion's `token_ids`: the model's up to its stop token, the environment's with all that the chat template
    puts before and behind it."""

    @property
    def is_sampled(self) -> bool:
        """Whether the model wrote it, so that it is trained on."""
        return self.role == "assistant"

    @property
    def shown(self) -> str:
        """Its part of a conversation's text: the parts of all turns, end to end, are readable."""
        return self.text if self.is_sampled else f"\n\n[{self.role}] {self.text}\n\n[assistant] "


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What follows a prompt in one sequence: token ids as sampled, never re-encoded text.

    An engine returns one turn of the model. A conversation (`ludic.rollout.turns`) is one completion too, in which the tokens of
    the environment's turns stand between the sampled ones.
    """

    token_ids: list[int]
    """[C], with the stop token at the end when `finish_reason` is `stop`."""
    logprobs: list[float] | None
    """[C], natural log-probabilities under the distribution that was sampled from (after temperature), or None; 0.0 for
    tokens of the environment."""
    finish_reason: FinishReason
    """Of the last turn. A conversation whose next turn has no room left was cut off: `length`."""
    policy_version: int
    """The version of the weights that sampled it, the oldest of a conversation's; 0 is the initial policy."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation, the model's first; their tokens are `token_ids`. () where the task has one turn."""

    @property
    def sampled_mask(self) -> list[bool]:
        """[C], False for tokens of the environment."""
        if not self.turns:
            return [True] * len(self.token_ids)
        return [turn.is_sampled for turn in self.turns for _ in range(turn.num_tokens)]

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens that the model wrote, stop tokens included."""
        if not self.turns:
            return len(self.token_ids)
        return sum(turn.num_tokens for turn in self.turns if turn.is_sampled)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseResult:
    """An answer found in a text, or why there is none. Exactly one of the two is set.

    Example:
        >>> ParseResult(answer="18")
        ParseResult(answer='18', error=None)
    """

    answer: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.answer is None) == (self.error is None):
            raise ValueError("a ParseResult holds an answer or an error, and not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """An environment's judgement of one completion."""

    reward: float
    correct: bool
    parse: ParseResult
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named figures that are averaged into metrics: components of the reward, other rules' verdicts as 0 or 1, and
    `grader_failed`, 1 where the grader gave up on the answer (a deadline, a crash), so that such a 0 is never silent,
    and `grader_timeout`, 1 where that was a deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion of one prompt, scored."""

    group_id: int
    """The prompt that it answers: unique in the run, and the same for every member of a group."""
    rollout_id: int
    """Its place in the group, 0 to G - 1."""
    prompt_token_ids: list[int]
    """[P]"""
    completion: Completion
    text: str
    """The completion's; of a conversation, all turns (`Turn.shown`)."""
    score: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """G rollouts of one prompt: what GRPO compares with one another."""

    group_id: int
    target: str
    rollouts: tuple[Rollout, ...]
    """[G]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSample:
    """One sequence to train on. The mask, not a prompt length, says which tokens: several turns need no other type."""

    token_ids: list[int]
    """[L]"""
    loss_mask: list[bool]
    """[L], True where the token was sampled by the policy and is to be trained on. The first token has no prediction
    and is always False."""
    rollout_logprobs: list[float] | None
    """[L], the sampler's log-probabilities; 0.0 where `loss_mask` is False."""
    advantage: float
    rollout: tuple[int, int] | None = None
    """The `group_id` and `rollout_id` of the rollout that it was made of; None for a sample that was made otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Whole sequences laid end to end in one row, without padding; a prompt that several of them share stands once.

    A row is cut into segments. A sequence by itself is one segment, whose tokens see one another. A prompt that is shared
    is a segment of its own, and what each of its sequences adds to it, from the first trained token on, is one more: the
    tokens of that one see the prompt and the segment's own. Example: the prompt [1, 2] with the completions [3, 4] and [5]

        input_ids            [1, 2,  3, 4,  5]
        position_ids         [0, 1,  2, 3,  2]
        cu_seqlens           [0, 2, 4, 5]                    segments of 2, 2 and 1 tokens,
        cu_seqlens_k         [0, 2, 6, 9]                    that see 2, 4 and 3 keys,
        key_indices          [0, 1,  0, 1, 2, 3,  0, 1, 4]   which are these tokens of the row
        target_positions     [2, 3, 4]                       the trained tokens 3, 4 and 5
        predictor_positions  [1, 2, 1]                       are predicted from the tokens 2, 3 and 2

    Entry t of `loss_mask`, `loss_weights`, `advantages` and `rollout_logprobs` speaks of the token `input_ids[t]`.
    """

    input_ids: torch.Tensor
    """[T] int64"""
    position_ids: torch.Tensor
    """[T] int64, each token's place in its sequence"""
    cu_seqlens: torch.Tensor
    """[S + 1] int32: segment s is tokens cu_seqlens[s] to cu_seqlens[s + 1]"""
    max_seqlen: int
    """The length of the longest segment."""
    cu_seqlens_k: torch.Tensor
    """[S + 1] int32: segment s sees the keys cu_seqlens_k[s] to cu_seqlens_k[s + 1], each of its tokens those up to its
    own, which are the last ones"""
    max_seqlen_k: int
    """The most keys that a segment sees."""
    key_indices: torch.Tensor | None
    """[K] int64: the token of the row that each key belongs to; None where the keys are the row itself"""
    target_positions: torch.Tensor
    """[N] int64: where the tokens stand that are trained on, ascending"""
    predictor_positions: torch.Tensor
    """[N] int64: the token that each of those is predicted from"""
    num_loss_tokens: int
    """N"""
    num_sequence_tokens: int
    """What the sequences hold in all, a shared prompt counted with each of them; padding is not counted."""
    loss_mask: torch.Tensor
    """[T] bool"""
    loss_weights: torch.Tensor
    """[T] float32: what each token's loss is multiplied by, so that the micro-batches of an update just add up. It holds
    the loss's normalisation over the *whole* update (1 / loss tokens for the token mean), and 0 off the mask."""
    advantages: torch.Tensor
    """[T] float32, each sequence's advantage on all its tokens; 0 on a shared prompt"""
    rollout_logprobs: torch.Tensor | None
    """[T] float32, 0 off the mask and NaN where the sampler gave none; None when it gave none in the whole row"""
    sample_indices: tuple[int, ...]
    """[S]: the place of each segment's sequence in the list that was packed; -1 for a shared prompt, and for padding"""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on `device`; the host does not wait for a copy to a GPU."""
        import torch

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()  # from other memory the host would wait until the data are on their way
            return tensor.to(device, non_blocking=True)

        held: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {name: move(value) for name, value in held.items() if isinstance(value, torch.Tensor)}
        return MicroBatch(**{**held, **moved})

"""The one seam between training and generation: token ids in, token ids out, and a way to take over new weights.

`vllm_client.VLLMEngine` talks to a vLLM server, `recovery.RecoveringEngine` also survives its loss, and `local.LocalEngine`
generates in this process. Nothing else in ludic knows which of them it has.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from ludic.types import Completion, SamplingParams

if TYPE_CHECKING:  # a terminal that shows an engine at work loads no torch for it
    import torch

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSyncReport:
    """What one weight sync did, for the log. Seconds are wall clock."""

    policy_version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    proof: str
    """How it was proven that the engine holds the weights, in words, with the figure that was compared."""
    logprob_gap: float | None = None
    """Mean absolute difference of log-probabilities on the probe prompt, in nats; None where none was taken."""
    phases_s: dict[str, float] = field(default_factory=dict)
    """Seconds of the parts, e.g. pause, send, proof, resume."""


class Policy(Protocol):
    """A model and the version of its weights, in the hands of the one thread that may change them."""

    async def read(self, reader: "Callable[[torch.nn.Module, int], Result]") -> Result:
        """The result of `reader(model, policy_version)`, called on that thread: the two belong together until it returns.

        May be called again at any time after a sync, by an engine whose server lost the weights; the version may have
        grown by then.
        """
        ...


@dataclass(frozen=True, slots=True)
class PolicyWeights:
    """`Policy` for a caller that leaves the model alone while an engine reads it: `reader` runs on a thread of asyncio's.

    Example:
        >>> await engine.update_weights(PolicyWeights(model, policy_version=3))
    """

    model: "torch.nn.Module"
    policy_version: int

    async def read(self, reader: "Callable[[torch.nn.Module, int], Result]") -> Result:
        """The result of `reader(model, policy_version)`."""
        return await asyncio.to_thread(reader, self.model, self.policy_version)


class InferenceEngine(Protocol):
    """Generates completions with the policy that it was last given."""

    @property
    def policy_version(self) -> int:
        """The version of the weights in use; 0 until the first `update_weights`."""
        ...

    @property
    def overlaps_training(self) -> bool:
        """Whether generation runs on another device than training, so that the two gain by running at the same time."""
        ...

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """Draw `num_completions` completions of one prompt. Safe to call many times concurrently.

        Each is stamped with the policy version at which its request started; its `logprobs` are None without
        `sampling.logprobs`.
        """
        ...

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        """Take over the policy's weights, prove that they arrived, and stamp what follows with their version.

        May be called while generations are in flight. They go on with the new weights, or end first under the old ones,
        as the engine has it; their completions keep the version at which they started, the oldest that sampled any of
        their tokens: staleness is never understated.
        """
        ...

    def counts(self) -> dict[str, float]:
        """What went wrong and was mended so far, by name, for the log; empty where nothing can."""
        ...

    async def aclose(self) -> None:
        """Let go of connections, processes and memory. Safe to call twice."""
        ...

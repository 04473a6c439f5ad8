"""Several engines with the same weights as one, for an evaluation: whole groups go to the least loaded.

An evaluation ends with the first engine that is lost, and is continued with `--resume-eval`. What trains has
`survival.several_servers`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from ludic.rollout.engine import Policy
from ludic.rollout.errors import EngineError
from ludic.types import Completion, SamplingParams

if TYPE_CHECKING:
    from ludic.inference.client.vllm_client import VLLMEngine


class LeastLoaded:
    """`InferenceEngine` over the clients of several engines. It sends no weights."""

    overlaps_training: bool = True

    def __init__(self, clients: "Sequence[VLLMEngine]") -> None:
        self._clients = tuple(clients)
        self._load: Counter[VLLMEngine] = Counter()

    @property
    def policy_version(self) -> int:
        return self._clients[0].policy_version

    def counts(self) -> dict[str, float]:
        """The sums of the clients' counts."""
        total: Counter[str] = Counter()
        for client in self._clients:
            total.update(client.counts())
        return dict(total)

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        """As `VLLMEngine.generate`, on the engine that has the fewest completions in flight."""
        client = min(self._clients, key=lambda one: self._load[one])
        self._load[client] += num_completions
        try:
            return await client.generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)
        finally:
            self._load[client] -= num_completions

    async def update_weights(self, policy: Policy) -> NoReturn:
        """Raises EngineError: these engines were opened to evaluate."""
        raise EngineError("these engines were opened without weight syncs, for an evaluation")

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()

"""The client of `server_lost`, which says what it is doing. A module of its own: it loads torch, and `--help` must not."""

import collections
import contextlib
from collections.abc import Sequence
from typing import Any

from ludic.inference.client.vllm_client import VLLMEngine
from ludic.rollout.engine import Policy, WeightSyncReport
from ludic.types import Completion, SamplingParams


class PhasedEngine(VLLMEngine):
    """A client that says what it is doing."""

    def __init__(self, base_url: str, **settings: Any) -> None:
        super().__init__(base_url, **settings)
        self.phases: collections.Counter[str] = collections.Counter()

    async def generate(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, sampling: SamplingParams
    ) -> list[Completion]:
        with self._phase("generation"):
            return await super().generate(prompt_token_ids, num_completions=num_completions, sampling=sampling)

    async def update_weights(self, policy: Policy) -> WeightSyncReport:
        with self._phase("sync"):
            return await super().update_weights(policy)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Any:
        self.phases[name] += 1
        try:
            yield
        finally:
            self.phases[name] -= 1

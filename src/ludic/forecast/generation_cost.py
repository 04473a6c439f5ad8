"""What generation costs, by decoding steps and by tokens: of the forecast, which measures both, and of `ludic.capacity`."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCost:
    """What generation costs: so many seconds for each decoding step, however many completions take part in it, and so many
    for each token."""

    step_s: float
    token_s: float

    def seconds(self, rollouts: int, *, mean: float, longest: int, in_flight: int, refills: bool) -> float:
        """Of `rollouts` completions of these lengths, `in_flight` at a time.

        An engine that `refills` has the next completion take the place of one that ended; another decodes batch by batch.
        """
        waves = longest * math.ceil(rollouts / in_flight)
        steps = longest + max(0, rollouts - in_flight) / in_flight * mean if refills else waves
        return self.step_s * steps + self.token_s * rollouts * mean

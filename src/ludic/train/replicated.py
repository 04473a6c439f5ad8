"""Several ranks that each compute with the whole model, as one process does, and share the optimizer.

Nothing is said between ranks while they forward and backward their rows. Once an update the gradients are added up, each rank
steps its part of the masters, and the stepped weights go to all (`flat_masters`).

Left out: models whose weights and gradients do not fit one GPU, 6 bytes a weight, which are `sharded`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ludic.train.flat_masters import FlatMasters
from ludic.train.master_weights import MasterWeights, Published
from ludic.train.optimizer_state import load_optimizer
from ludic.train.rank_learner import RankLearner


class ReplicatedLearner(RankLearner):
    """A `RankLearner` with the whole model on each rank; `model` is moved to the rank's device."""

    _forwards_empty_rows = False
    _flat: FlatMasters

    def _make_masters(self, model: PreTrainedModel, compute_dtype: torch.dtype) -> MasterWeights:
        self._flat = FlatMasters(model, self.ranks, compute_dtype=compute_dtype)
        return self._flat

    def _gradients(self) -> list[torch.Tensor]:
        return self._flat.reduce()

    def _publish(self) -> Published:
        published = super()._publish()
        if self.config.epochs_per_update > 1:  # else `_drop` is next
            self._flat.clear()
        return published

    def _on_the_host(self, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        shapes = [parameter.shape for parameter in self.model.parameters()]
        return [whole.to("cpu", copy=True).view(shapes[number]) for number, whole in self._flat.gather(pieces)]

    def resume(self, folder: Path) -> None:
        """Restore this rank's part of the optimizer's state: every rank reads the folder, whatever the number of ranks that
        wrote it."""
        shapes = [parameter.shape for parameter in self.model.parameters()]
        parts = list(zip(shapes, self._flat.segments, strict=True))
        load_optimizer(folder, self.optimizer, model=self.model, parts=parts)
        self._take_own_settings()

    def _drop(self) -> None:
        super()._drop()
        self._flat.clear()

"""Several ranks that each hold a part of the weights, their gradients and the optimizer's state: PyTorch's FSDP2.

For what does not fit otherwise: every micro-batch gathers the layers' weights twice and adds up their gradients, and all
ranks forward equally many rows. Rank 0 also keeps one whole copy of the model in the dtype that it computes in, to send it.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ludic.task.rope import pin_rope
from ludic.train.attention import checkpoint_layers, compile_layers, prepare_packed_attention
from ludic.train.logprobs import TokenStats
from ludic.train.master_weights import cast_parameters, check_float32
from ludic.train.model_checks import check_head, check_isolation, check_mode
from ludic.train.optimizer_state import load_optimizer
from ludic.train.rank_learner import RankLearner
from ludic.train.shards import ShardedForward, ShardMasters, gather, rows_of
from ludic.types import MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedLearner(RankLearner):
    """A `RankLearner` with a part of the model on each rank; it is sharded in place. `model` is afterwards rank 0's whole
    copy, on the device; on the other ranks the sharded one."""

    _forwards_empty_rows = True

    def _prepare(
        self,
        model: "PreTrainedModel",
        reference: "PreTrainedModel | None",
        compute_dtype: torch.dtype,
        checkpoint: Path | None,
    ) -> None:
        """The checks of `Learner._prepare`, on whole models: on the CPU, and on rank 0's GPU. Then the models are sharded."""
        check_float32(model)
        prepare_packed_attention(model)
        pin_rope(model, self.config.max_seq_len)
        check_isolation(model, max_seq_len=self.config.max_seq_len)
        check_head(model)
        names = [name for name, _ in model.named_parameters()]
        self._shapes = [parameter.shape for parameter in model.parameters()]
        if self.ranks.rank == 0:
            self.model = whole_copy(model, compute_dtype, self.device)
            if self.device.type == "cuda":  # other kernels, and another dtype, than those that were looked at above
                check_isolation(self.model, max_seq_len=self.config.max_seq_len)
                check_head(self.model)
                check_mode(self.model)
        if self.config.gradient_checkpointing:
            checkpoint_layers(model)
        check_mode(model)
        if self._compile:
            compile_layers(model)
        offload = self.config.cpu_offload
        self._forward = ShardedForward(model, self.ranks, compute_dtype=compute_dtype, offload=offload)
        self._policy = self._forward
        self.masters = self._pieces = ShardMasters(model, names, self._shapes, compute_dtype)
        self._reference = None
        if reference is not None:
            prepare_packed_attention(reference)
            pin_rope(reference, self.config.max_seq_len)
            reference.requires_grad_(False)
            self._reference = ShardedForward(reference, self.ranks, compute_dtype=compute_dtype, offload=offload)

    def _token_stats(self, model: Any, batch: MicroBatch, **settings: Any) -> TokenStats:
        stats: TokenStats = model(batch, **settings)  # a call of the module, around which FSDP gathers
        return stats

    def _gradients(self) -> list[torch.Tensor]:
        return self._pieces.take_gradients()

    def _drop(self) -> None:
        self._pieces.take_gradients()
        super()._drop()

    @torch.no_grad()
    def _after_steps(self) -> None:
        """Bring rank 0's copy of the model up to date with the masters of all ranks."""
        whole = list(self.model.parameters())

        def take(number: int, tensor: torch.Tensor) -> None:
            whole[number].data.copy_(tensor)

        gather(self.ranks, self._pieces.computing, self._shapes, take)

    def _on_the_host(self, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        whole: list[torch.Tensor] = []
        gather(self.ranks, pieces, self._shapes, lambda _, tensor: whole.append(tensor.to("cpu", copy=True)))
        return whole

    def resume(self, folder: Path) -> None:
        """Restore this rank's part of the optimizer's state: every rank reads the folder, whatever the number of ranks that
        wrote it."""
        rows = [(shape, rows_of(shape, self.ranks.rank, self.num_ranks)) for shape in self._shapes]
        load_optimizer(folder, self.optimizer, model=self._forward.model, parts=rows)
        self._take_own_settings()


def whole_copy(model: "PreTrainedModel", dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """A copy to send and to compare with, not to train: parameters in `dtype`, buffers as they are."""
    copied = copy.deepcopy(model)
    copied.requires_grad_(False)
    cast_parameters(copied, dtype)
    return torch.nn.Module.to(copied, device)

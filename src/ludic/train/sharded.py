"""A learner whose model is sharded over several processes: the same update, computed by all of them.

Rank 0 has the one `GRPOTrainer` of a run. Each call of its learner becomes one message to the others, which `follow`: rows to
accumulate, the end of an update, a gather. So all ranks meet the same collectives in the same order, and nothing that rank 0
does in between, with a server for example, can come between two of them.

Rank 0 also keeps one whole copy of the model in the dtype that it computes in. Servers are sent that copy, a server that
comes back is sent it again, and probes are computed with it, all without the other ranks.

Gradients are added up over the ranks once an update, by an empty row whose backward pass reduces what each has accumulated.
With `cpu_offload` they are added up after every micro-batch instead: whole gradients would stay on the GPU.
"""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ludic.config import GRPOConfig
from ludic.task.rope import pin_rope
from ludic.train.attention import checkpoint_layers, compile_layers, prepare_packed_attention
from ludic.train.corrections import check_rollout_logprobs
from ludic.train.dealing import deal, empty_row
from ludic.train.learner import Learner, Watch, unwatched
from ludic.train.logprobs import TokenStats
from ludic.train.loss_metrics import fetch_metrics
from ludic.train.master_weights import Published, cast_parameters, check_float32
from ludic.train.mini_batches import Row
from ludic.train.model_checks import check_head, check_isolation, check_mode
from ludic.train.nonfinite import nonfinite_names
from ludic.train.optimizer_state import load_optimizer
from ludic.train.ranks import Ranks
from ludic.train.shards import ShardedForward, ShardMasters, gather, rows_of
from ludic.types import MicroBatch, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_END = "end"


class ShardedLearner(Learner):
    """`Learner` on several ranks, each of which makes one; rank 0's is driven, the others `follow`.

    Args:
        model: the policy, float32, on the CPU, the same on all ranks; it is sharded in place.
        reference_model: likewise.

    `model` is afterwards rank 0's whole copy, on the device; on the other ranks the sharded one.

    Raises:
        ValueError: as `Learner`, or for a setting that works on one rank only.
    """

    def __init__(
        self,
        config: GRPOConfig,
        model: "PreTrainedModel",
        *,
        ranks: Ranks,
        reference_model: "PreTrainedModel | None" = None,
    ) -> None:
        check_settings(config, ranks.size)
        self.ranks, self.num_ranks = ranks, ranks.size
        self._unreduced = False
        super().__init__(config, model, reference_model=reference_model, device=ranks.device)
        self._empty = empty_row(self._pad_to, share_prompts=config.share_prompts, with_logprobs=config.needs_logprobs)

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
        self._forward.reduce_gradients(offload)
        self._policy = self._forward
        self.masters = self._pieces = ShardMasters(model, names, self._shapes, compute_dtype)
        self._reference = None
        if reference is not None:
            prepare_packed_attention(reference)
            pin_rope(reference, self.config.max_seq_len)
            reference.requires_grad_(False)
            self._reference = ShardedForward(reference, self.ranks, compute_dtype=compute_dtype, offload=offload)

    # -- rank 0: one message to all, and its own part of the work --------------------------------------------------------

    def accumulate(self, samples: Sequence[TrainingSample], watch: Watch = unwatched) -> None:
        self.add_up(samples, watch)

    def add_up(self, samples: Sequence[TrainingSample], watch: Watch = unwatched) -> None:
        check_rollout_logprobs(samples, self._loss_settings)
        self._part.count(samples)
        longest = max(len(sample.token_ids) for sample in samples)
        rounds = deal(
            lambda budget: self._pack(samples, budget),
            longest=-(-longest // self._pad_to) * self._pad_to,
            token_budget=self.token_budget,
            num_ranks=self.num_ranks,
            empty=self._empty,
        )
        for row in (row for one in rounds for row in one):
            super()._count(row)
        self._all("_rows_here", [([one[rank] for one in rounds],) for rank in range(self.num_ranks)], samples, watch)

    def step(
        self, *, learning_rate: float, num_without_loss: int = 0, advantage_scale: float = 1.0
    ) -> dict[str, float]:
        part = self._part
        counts = (part.num_sequences, part.num_loss_tokens, part.prompts)
        figures: dict[str, float] = self._all(
            "_step_here", [(learning_rate, num_without_loss, advantage_scale, *counts)] * self.num_ranks
        )
        return figures

    def discard(self) -> None:
        if self._unreduced:
            self._all("_discard_here", [()] * self.num_ranks)
        self._drop()

    def full_state(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        state: tuple[dict[str, torch.Tensor], torch.optim.Optimizer] = self._all(
            "_full_state_here", [()] * self.num_ranks
        )
        return state

    def _all(self, name: str, arguments: Sequence[tuple[Any, ...]], *own: Any) -> Any:
        """Have every rank call the method `name` with its arguments, this one with `own` behind them."""
        try:
            self.ranks.tell([(name, given) for given in arguments])
            return getattr(self, name)(*arguments[0], *own)
        except Exception as error:
            # A number that is not finite is so on all ranks, and a matter of the run.
            raise error if isinstance(error, FloatingPointError) else self.ranks.explained(error) from error

    def follow(self) -> None:
        """The life of every other rank: do as rank 0 says, until it says that this was all.

        Raises:
            Exception: what rank 0 is then told.
        """
        while True:
            name, arguments = self.ranks.told()
            if name == _END:
                return
            # Numbers that are not finite are so on rank 0 too, which has raised and may want a last word of this rank.
            with contextlib.suppress(FloatingPointError):
                getattr(self, name)(*arguments)

    # -- what every rank does, at the same time ---------------------------------------------------------------------------

    def _rows_here(
        self, rows: Sequence[MicroBatch], samples: Sequence[TrainingSample] = (), watch: Watch = unwatched
    ) -> None:
        self._unreduced = True
        with self._within_memory():
            self._add_rows(rows, samples, watch)

    def _step_here(
        self,
        learning_rate: float,
        num_without_loss: int,
        advantage_scale: float,
        num_sequences: int,
        num_loss_tokens: int,
        prompts: set[int],
    ) -> dict[str, float]:
        part = self._part  # of the whole update, also where this rank has some of its rows
        part.num_sequences, part.num_loss_tokens, part.prompts = num_sequences, num_loss_tokens, prompts
        figures = super().step(
            learning_rate=learning_rate, num_without_loss=num_without_loss, advantage_scale=advantage_scale
        )
        if self.stepped:
            self._renew_copy()
        return figures

    def _discard_here(self) -> None:
        self._gradients()
        self._drop()

    @torch.no_grad()
    def _renew_copy(self) -> None:
        """Bring rank 0's copy of the model up to date with the masters of all ranks."""
        whole = list(self.model.parameters())

        def take(number: int, tensor: torch.Tensor) -> None:
            whole[number].data.copy_(tensor)

        gather(self.ranks, self._pieces.computing, self._shapes, take)

    def _full_state_here(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer] | None:
        """On rank 0 what `full_state` promises, in the host's memory; None on the others."""
        masters = self.masters.parameters
        whole = self._on_the_host([master.data for master in masters])
        states = [self.optimizer.state.get(master) or {} for master in masters]
        stepped = [number for number, state in enumerate(states) if state]
        moments = {
            part: dict(zip(stepped, self._on_the_host([states[n][part] for n in stepped], stepped), strict=False))
            for part in ("exp_avg", "exp_avg_sq")
        }
        if self.ranks.rank:
            return None
        parameters = [torch.nn.Parameter(tensor, requires_grad=False) for tensor in whole]
        optimizer = torch.optim.AdamW(parameters)
        for number in stepped:
            state = {part: moments[part][number] for part in moments} | {"step": states[number]["step"]}
            optimizer.state[parameters[number]] = state
        places = {
            parameter.data_ptr(): tensor for parameter, tensor in zip(self.model.parameters(), whole, strict=True)
        }
        state_dict: dict[str, torch.Tensor] = self.model.state_dict()
        return {name: places.get(tensor.data_ptr(), tensor) for name, tensor in state_dict.items()}, optimizer

    def _on_the_host(self, pieces: Sequence[torch.Tensor], numbers: Sequence[int] | None = None) -> list[torch.Tensor]:
        """The whole tensors of these pieces, of the parameters of these numbers, on rank 0; [] on the others."""
        shapes = self._shapes if numbers is None else [self._shapes[number] for number in numbers]
        whole: list[torch.Tensor] = []
        gather(self.ranks, pieces, shapes, lambda _, tensor: whole.append(tensor.to("cpu", copy=True)))
        return whole

    def resume(self, folder: Path) -> None:
        """Restore this rank's part of the optimizer's state: every rank reads the folder. The number of ranks may be another
        than that of the run that wrote it."""
        rows = [(shape, rows_of(shape, self.ranks.rank, self.num_ranks)) for shape in self._shapes]
        load_optimizer(folder, self.optimizer, model=self._forward.model, rows=rows)
        self._take_own_settings()

    # -- what of an update is more than this rank's own ---------------------------------------------------------------

    def _token_stats(self, model: Any, batch: MicroBatch, **settings: Any) -> TokenStats:
        stats: TokenStats = model(batch, **settings)  # a call of the module, around which FSDP gathers
        return stats

    def _count(self, row: MicroBatch) -> None:
        """Rank 0 counts the rows of all as it deals them."""

    def _gradients(self) -> list[torch.Tensor]:
        """Add up the gradients of all ranks; each gets those of its pieces."""
        self._forward.reduce_gradients(True)
        row = self._empty.to(self.device)
        self._backward(Row(batch=row, reference=self._reference_logprobs(row)))
        self._metrics.pop()
        self._forward.reduce_gradients(self.config.cpu_offload)
        self._unreduced = False
        return self._pieces.take_gradients()

    def _total_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        square = super()._total_norm(gradients).double().square()
        return self.ranks.total(square.to(self.device)).sqrt().float()

    def _fetch(self, norm: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[float]]:
        columns, others = fetch_metrics(self._metrics, norm)
        return joined(self.ranks.share(columns)), others

    def _publish(self) -> Published:
        changed, finite = self.masters.publish()
        self.ranks.total(changed := changed.to(self.device))
        self.ranks.total(finite := finite.to(self.device, torch.float32), dist.ReduceOp.MIN)
        return Published(changed=changed, finite=finite.bool())

    def _nonfinite_names(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        held = [(name, tensor) for name, tensor in zip(names, tensors, strict=True) if tensor.numel()]
        found = set().union(*self.ranks.share(nonfinite_names([n for n, _ in held], [t for _, t in held])))
        return tuple(name for name in names if name in found)


def whole_copy(model: "PreTrainedModel", dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """A copy to send and to compare with, not to train: parameters in `dtype`, buffers as they are."""
    copied = copy.deepcopy(model)
    copied.requires_grad_(False)
    cast_parameters(copied, dtype)
    return torch.nn.Module.to(copied, device)


def joined(columns: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The metrics of all ranks' micro-batches by name, [sum of M]; 0 where a rank's rows lack one."""
    names = list(dict.fromkeys(name for one in columns for name in one))
    return {
        name: torch.cat([one[name] if name in one else torch.zeros_like(one["loss"]) for one in columns])
        for name in names
    }


def check_settings(config: GRPOConfig, num_ranks: int) -> None:
    """Refuse what works on one rank only.

    Raises:
        ValueError: one line with the flag.
    """
    if config.lora_rank:
        raise ValueError(
            f"--lora-rank {config.lora_rank} is for one process: an adapter is small, so train it without torchrun, or train all "
            f"weights on the {num_ranks} ranks"
        )
    if config.mini_batches > 1:
        raise ValueError(
            f"--mini-batches {config.mini_batches} is for one process: leave it out, or train without torchrun"
        )
    if config.record_token_logprobs:
        raise ValueError(
            f"--record-token-logprobs records what one process trains on, and {num_ranks} share the work: leave it out"
        )
    if config.micro_token_budget is None and torch.cuda.is_available():
        raise ValueError(
            "--micro-token-budget auto tries what fits one GPU, and a try that fails would end all "
            f"{num_ranks} ranks: give a number"
        )
    if num_ranks > config.rollouts_per_update:
        raise ValueError(
            f"{num_ranks} ranks for --rollouts-per-update {config.rollouts_per_update}: some would never have a sequence to "
            "train on; start fewer ranks, or raise it"
        )

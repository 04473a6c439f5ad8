"""A learner whose work is shared by several processes: the same update, computed by all of them.

Rank 0 has the one `GRPOTrainer` of a run. Each call of its learner becomes one message to the others, which `follow`: rows to
accumulate, the end of an update, a checkpoint. So all ranks meet the same collectives in the same order, and nothing that rank
0 does in between, with a server for example, can come between two of them.

What lies where is left to `replicated` (whole weights on each rank) and `sharded` (PyTorch's FSDP2). In both, the masters and
AdamW's state are cut over the ranks, and rank 0's `model` is whole: servers are sent it, and probes are computed with it,
without the other ranks.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ludic.config import GRPOConfig
from ludic.train.corrections import check_rollout_logprobs
from ludic.train.dealing import deal, empty_row, from_wire, to_wire
from ludic.train.learner import Learner, Watch, unwatched
from ludic.train.loss_metrics import fetch_metrics
from ludic.train.master_weights import Published
from ludic.train.nonfinite import nonfinite_names
from ludic.train.ranks import Ranks
from ludic.types import MicroBatch, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_END = "end"


class RankLearner(Learner):
    """`Learner` on several ranks, each of which makes one; rank 0's is driven, the others `follow`.

    Args:
        model: the policy, float32, on the CPU, the same on all ranks.
        reference_model: likewise.

    Raises:
        ValueError: as `Learner`, or for a setting that works on one rank only.
    """

    _forwards_empty_rows: bool
    """Whether all ranks must forward the same number of rows."""

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
        self._begun = False
        """Whether other ranks have something of the update."""
        super().__init__(config, model, reference_model=reference_model, device=ranks.device)
        self._empty = empty_row(self._pad_to, share_prompts=config.share_prompts, with_logprobs=config.needs_logprobs)

    def _on_the_host(self, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """On rank 0 the whole tensors, in the host's memory, of which the ranks have `pieces`, one for each parameter; [] on
        the others."""
        raise NotImplementedError

    # -- rank 0: one message to all, and its own part of the work --------------------------------------------------------

    def accumulate(self, samples: Sequence[TrainingSample], watch: Watch = unwatched) -> None:
        self.add_up(samples, watch)

    def add_up(self, samples: Sequence[TrainingSample], watch: Watch = unwatched) -> None:
        check_rollout_logprobs(samples, self._loss_settings)
        self._part.count(samples)
        mine, *others = dealt = self._deal(samples)
        for row in (row for rows in dealt for row in rows):
            super()._count(row)
        self._begun = True
        sent = [([to_wire(row) for row in rows],) for rows in others]
        self._all("_rows_from_rank_0", [(), *sent], own=lambda: self._rows_here(mine, samples, watch))

    def _deal(self, samples: Sequence[TrainingSample]) -> list[list[MicroBatch]]:
        """The rows of each rank."""
        longest = max(len(sample.token_ids) for sample in samples)
        rounds = deal(
            lambda budget: self._pack(samples, budget),
            longest=-(-longest // self._pad_to) * self._pad_to,
            token_budget=self.token_budget,
            num_ranks=self.num_ranks,
            empty=self._empty,
        )
        return [
            [row for row in rows if self._forwards_empty_rows or row is not self._empty]
            for rows in zip(*rounds, strict=True)
        ]

    def step(
        self, *, learning_rate: float, num_without_loss: int = 0, advantage_scale: float = 1.0
    ) -> dict[str, float]:
        part = self._part
        counts = (part.num_sequences, part.num_loss_tokens, part.prompts)
        self._begun = False
        figures: dict[str, float] = self._all(
            "_step_here", [(learning_rate, num_without_loss, advantage_scale, *counts)] * self.num_ranks
        )
        return figures

    def discard(self) -> None:
        if self._begun:  # else the last step has dropped all there was
            self._begun = False
            self._all("_drop", [()] * self.num_ranks)

    def full_state(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        state: tuple[dict[str, torch.Tensor], torch.optim.Optimizer] = self._all(
            "_full_state_here", [()] * self.num_ranks
        )
        return state

    def _all(self, name: str, arguments: Sequence[tuple[Any, ...]], *, own: Any = None) -> Any:
        """Have every rank call the method `name` with its arguments; this one calls `own`, if given."""
        try:
            self.ranks.tell([(name, given) for given in arguments])
            return own() if own is not None else getattr(self, name)(*arguments[0])
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

    def _rows_from_rank_0(self, rows: Sequence[Any]) -> None:
        self._rows_here([from_wire(row) for row in rows])

    def _rows_here(
        self, rows: Sequence[MicroBatch], samples: Sequence[TrainingSample] = (), watch: Watch = unwatched
    ) -> None:
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
            self._after_steps()
        return figures

    def _after_steps(self) -> None:
        """What a rank does once the weights are those of the next version."""

    def _full_state_here(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer] | None:
        """On rank 0 what `full_state` promises, in the host's memory; None on the others."""
        masters = self.masters.parameters
        whole = self._on_the_host([master.data for master in masters])
        states = [self.optimizer.state.get(master) or {} for master in masters]
        steps = [state["step"] for state in states if state]
        moments: dict[str, list[torch.Tensor]] = {}
        if steps:
            for part in ("exp_avg", "exp_avg_sq"):
                pieces = zip(states, masters, strict=True)
                moments[part] = self._on_the_host([state.get(part, torch.zeros_like(m.data)) for state, m in pieces])
        if self.ranks.rank:
            return None
        parameters = [torch.nn.Parameter(tensor, requires_grad=False) for tensor in whole]
        optimizer = torch.optim.AdamW(parameters)
        for number, (parameter, master) in enumerate(zip(parameters, masters, strict=True)):
            if steps and master.requires_grad:
                state = {part: moments[part][number] for part in moments}
                optimizer.state[parameter] = state | {
                    "step": steps[0].clone()
                }  # safetensors wants no two of one memory
        places = {
            parameter.data_ptr(): tensor for parameter, tensor in zip(self.model.parameters(), whole, strict=True)
        }
        state_dict: dict[str, torch.Tensor] = self.model.state_dict()
        return {name: places.get(tensor.data_ptr(), tensor) for name, tensor in state_dict.items()}, optimizer

    # -- what of an update is more than this rank's own ---------------------------------------------------------------

    def _count(self, row: MicroBatch) -> None:
        """Rank 0 counts the rows of all as it deals them."""

    def _total_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        square = super()._total_norm(gradients).double().square()
        return self.ranks.total(square.to(self.device)).sqrt().float()

    def _fetch(self, norm: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[float]]:
        columns, others = fetch_metrics(self._metrics, norm) if self._metrics else ({}, [norm.item()])
        return joined(self.ranks.share(columns)), others

    def _publish(self) -> Published:
        changed, finite = self.masters.publish()
        totals = self.ranks.total(torch.stack([changed, (~finite).double()]).to(self.device))
        return Published(changed=totals[0], finite=totals[1] == 0)

    def _nonfinite_names(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        held = [(name, tensor) for name, tensor in zip(names, tensors, strict=True) if tensor.numel()]
        found = set().union(*self.ranks.share(nonfinite_names([n for n, _ in held], [t for _, t in held])))
        return tuple(name for name in names if name in found)


def joined(columns: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The metrics of all ranks' micro-batches by name, [sum of M]; 0 where a rank's rows lack one."""
    names = list(dict.fromkeys(name for one in columns for name in one))
    return {
        name: torch.cat([one[name] if name in one else torch.zeros_like(one["loss"]) for one in columns if one])
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

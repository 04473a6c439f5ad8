"""The half of the trainer that touches the device: samples in, gradients, one optimizer step, figures out.

An update is accumulated piece by piece, as its rollouts arrive, so that training hides behind generation. What a mean over
the update divides by is known only with its last piece: the gradient is summed undivided and scaled once, before clipping.
With several mini-batches an update, the pieces are only looked at until all are there (see `mini_batches`).
Only `step` waits for the device: for the figures that decide whether the step is taken, and for what it did to the weights.

Left out: more than one training GPU, which is `rank_learner` (docs/several_gpus.md); an adapter is trained by one process alone.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ludic.config import GRPOConfig
from ludic.task.rope import pin_rope
from ludic.train.attention import checkpoint_layers, compile_layers, prepare_packed_attention
from ludic.train.corrections import check_rollout_logprobs
from ludic.train.logprobs import TokenStats, token_logprobs
from ludic.train.lora import Adapter
from ludic.train.loss_inputs import loss_inputs
from ludic.train.loss_metrics import fetch_metrics, merge_steps, reduce_columns
from ludic.train.losses import LOSSES, loss_settings
from ludic.train.master_weights import MasterWeights, Published, cast_parameters
from ludic.train.mini_batches import Part, Row, by_sample, on_row, split
from ludic.train.model_checks import check_head, check_isolation, check_mode
from ludic.train.nonfinite import LARGEST_NORM, NonFinite, find_nonfinite, nonfinite_names
from ludic.train.optimizer_state import load_optimizer
from ludic.train.packing import pack, update_scale
from ludic.train.token_budget import check_row_length, out_of_memory
from ludic.types import MicroBatch, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ROW_MULTIPLE = 128
"""On a GPU, rows are padded to a multiple of this, so that compiled layers serve every length alike."""

ENOUGH_TOKENS = 12_288
"""Tokens of sequences that are worth a micro-batch while others are still being generated. Less would keep the GPU waiting
for its host, more would be left to do when the last rollout is there."""

Watch = Callable[[Sequence[TrainingSample], MicroBatch, torch.Tensor], None]
"""Takes the samples that were packed, one row of them on the device, and the row's log-probs [T], detached."""


def unwatched(samples: Sequence[TrainingSample], row: MicroBatch, logprobs: torch.Tensor) -> None:
    """The `Watch` that looks at nothing."""


class Learner:
    """Trains `model` on the samples of one update at a time.

    On a GPU the model computes in bf16 from then on: its parameters become rounded copies of fp32 masters. With
    `config.lora_rank` it gets an adapter, and nothing else of it is trained.

    Args:
        model: the policy, float32, on the device that trains; with an adapter, the base.
        reference_model: frozen, on the same device; needed if, and only if, `config.kl_coef` is above 0 and there is no
            adapter, whose reference is its base.
        checkpoint: whose adapter is trained further; None for a new one.
        device: that trains; by default the one that the model is on.

    Raises:
        ValueError: the model is not float32, cannot be trained on packed rows, or the reference is missing.
    """

    num_ranks = 1
    """Processes that share the work of an update."""
    adapter: Adapter | None = None
    """Of a LoRA training."""

    def __init__(
        self,
        config: GRPOConfig,
        model: "PreTrainedModel",
        *,
        reference_model: "PreTrainedModel | None" = None,
        checkpoint: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        if (config.kl_coef > 0 and not config.lora_rank) != (reference_model is not None):
            raise ValueError("a reference model is needed if, and only if, kl_coef is above 0 and lora_rank is 0")
        self.config = config
        self.model = model
        self.device = device or next(model.parameters()).device
        self.token_budget = config.micro_token_budget or config.max_seq_len
        """Tokens of one micro-batch; with `auto` a trial raises it to what fits (see `memory`)."""
        on_gpu = self.device.type == "cuda"
        self._pad_to = ROW_MULTIPLE if on_gpu else 1
        check_row_length(config, pad_to=self._pad_to)
        self._compile = config.compile and on_gpu
        self._loss = LOSSES[config.loss]
        self._normalisation = config.normalisation or self._loss.normalisation
        self._loss_settings = loss_settings(config)
        self._prepare(model, reference_model, torch.bfloat16 if on_gpu else torch.float32, checkpoint)
        self.optimizer = torch.optim.AdamW(
            self.masters.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=0.0,  # not for all weights, see `MasterWeights.decay`
            fused=True,
        )
        self.stepped = False
        """Whether the last `step` changed the weights, also where it failed."""
        self.nonfinite: NonFinite | None = None
        """What kept the last `step` that was skipped, or cut short, from being taken."""
        self._clear()

    def _prepare(
        self,
        model: "PreTrainedModel",
        reference: "PreTrainedModel | None",
        compute_dtype: torch.dtype,
        checkpoint: Path | None,
    ) -> None:
        """Make both models compute packed rows in `compute_dtype`, and check that they compute the same as before."""
        prepare_packed_attention(model)
        pin_rope(model, self.config.max_seq_len)
        if self.config.lora_rank:
            self.adapter = Adapter(model, self.config, compute_dtype=compute_dtype, checkpoint=checkpoint)
        self.masters = self._make_masters(model, compute_dtype)
        check_isolation(model, max_seq_len=self.config.max_seq_len)
        check_head(model)
        self._policy: torch.nn.Module = model
        self._reference: torch.nn.Module | None = reference
        if self.adapter is not None:
            self.adapter.use(dict(zip(self.masters.names, self.masters.parameters, strict=True)))
            self._reference = self.adapter.plain if self.config.kl_coef > 0 else None
        if reference is not None:
            prepare_packed_attention(reference)
            pin_rope(reference, self.config.max_seq_len)
            reference.requires_grad_(False)
            cast_parameters(reference, compute_dtype)
            torch.nn.Module.to(reference, self.device)
        if self.config.gradient_checkpointing:
            checkpoint_layers(model)
        check_mode(model)
        if self._compile:
            compile_layers(model)

    def _make_masters(self, model: "PreTrainedModel", compute_dtype: torch.dtype) -> MasterWeights:
        return MasterWeights(model, compute_dtype=compute_dtype)

    def _clear(self) -> None:
        self._metrics: list[Mapping[str, torch.Tensor]] = []
        self._steps: list[Published] = []
        self._part = Part()
        self._kept: list[TrainingSample] = []
        self._olds: list[torch.Tensor] = []  # of each sample that is kept, at its trained tokens
        self._forwarded = self._represented = self._micro_batches = 0

    @contextlib.contextmanager
    def whole_model(self) -> Iterator["PreTrainedModel"]:
        """The policy as engines read it: `model`, or the base with the adapter merged in unless that is sent by itself."""
        if self.adapter is None or self.config.lora_sync == "adapter":
            yield self.model
            return
        with self.adapter.merged() as merged:
            yield merged

    # -- one update ------------------------------------------------------------------------------------------------

    @property
    def num_accumulated_tokens(self) -> int:
        """Tokens of the update's sequences that the device was given so far, a shared prompt counted with each."""
        return self._represented

    @property
    def enough_tokens(self) -> int:
        """Tokens of sequences that are worth a call of `accumulate` while more are on their way."""
        return self.num_ranks * min(self.token_budget, ENOUGH_TOKENS)

    def accumulate(self, samples: Sequence[TrainingSample], watch: Watch = unwatched) -> None:
        """Take in some of the update's samples, whole groups of them: add their gradient, or with several mini-batches keep
        them for `step`. Returns before the device is done, and so must `watch`, which is shown the log-probs of each row.

        Raises:
            OutOfMemory: the micro-batch did not fit; the gradient is lost, the weights are untouched.
        """
        if self.config.mini_batches == 1:
            self.add_up(samples, watch)
            return
        with self._within_memory():
            self._keep(samples, watch)

    def add_up(self, samples: Sequence[TrainingSample], watch: Watch = unwatched) -> None:
        """Add the gradient of some samples, whatever the number of mini-batches. Raises as `accumulate`."""
        check_rollout_logprobs(samples, self._loss_settings)
        self._part.count(samples)
        with self._within_memory():
            self._add_rows(self._pack(samples, self.token_budget), samples, watch)

    def _add_rows(self, rows: Sequence[MicroBatch], samples: Sequence[TrainingSample], watch: Watch) -> None:
        for packed in rows:
            batch = packed.to(self.device)
            self._count(batch)
            row = Row(batch=batch, reference=self._reference_logprobs(batch))
            logprobs = self._backward(row)
            watch(samples, batch, logprobs)
            if self.config.epochs_per_update > 1:
                row.old = logprobs
                self._part.rows.append(row)

    def _count(self, row: MicroBatch) -> None:
        self._forwarded += row.input_ids.numel()
        self._represented += row.num_sequence_tokens
        self._micro_batches += 1

    def _keep(self, samples: Sequence[TrainingSample], watch: Watch) -> None:
        """Take the samples' log-probs before any step of the update."""
        check_rollout_logprobs(samples, self._loss_settings)
        olds: dict[int, torch.Tensor] = {}
        for packed in self._pack(samples, self.token_budget):
            batch = packed.to(self.device)
            self._forwarded += batch.input_ids.numel()
            self._represented += batch.num_sequence_tokens
            logprobs = self._logprobs(self._policy, batch)
            olds |= by_sample(batch, logprobs, samples)
            watch(samples, batch, logprobs)
        self._kept += samples
        self._olds += [olds[place] for place in range(len(samples))]

    def _parts(self) -> list[Part]:
        """What the optimizer steps of one pass are taken on."""
        if self.config.mini_batches == 1:
            return [self._part]
        parts = []
        for places in split(self._kept, self.config.mini_batches):
            samples, olds = [self._kept[place] for place in places], [self._olds[place] for place in places]
            part = Part()
            part.count(samples)
            for packed in self._pack(samples, self.token_budget):
                batch = packed.to(self.device)
                self._forwarded += batch.input_ids.numel()
                self._micro_batches += 1
                part.rows.append(Row(batch=batch, reference=self._reference_logprobs(batch), old=on_row(batch, olds)))
            parts.append(part)
        return parts

    def _pack(self, samples: Sequence[TrainingSample], token_budget: int) -> list[MicroBatch]:
        return pack(
            samples,
            token_budget=token_budget,
            normalisation=self._normalisation,
            max_completion_tokens=self.config.max_completion_len or self.config.max_seq_len,
            share_prompts=self.config.share_prompts,
            scale=1.0,
            pad_to_multiple=self._pad_to,
        )

    @contextlib.contextmanager
    def _within_memory(self) -> Iterator[None]:
        """What runs out of memory loses the gradient, and says which flag to turn."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._drop()
            raise out_of_memory(self.config, token_budget=self.token_budget, pad_to=self._pad_to) from error

    def step(
        self, *, learning_rate: float, num_without_loss: int = 0, advantage_scale: float = 1.0
    ) -> dict[str, float]:
        """End the update: scale and clip the gradient, step, and hand the new weights to the model; the update's figures.

        `num_without_loss` sequences of the update were not accumulated because their groups have no variance; a mean over
        sequences counts them (see `packing.Normalisation`). All advantages are multiplied by `advantage_scale`, which the
        loss is proportional to without a KL term.

        Where the loss, a log-prob or the gradient is not finite, the step is skipped: weights and optimizer stay as they were,
        to the bit. `skipped_update` is then 1.0, else 0.0; the figures are those that are finite, with counts of what is not,
        and `diagnosis` has the words. Of several steps those before the first skip stay; `skipped_steps` counts the rest.

        Raises:
            FloatingPointError: the weights are not finite: they, or the optimizer's state, were damaged from outside. They
                must not be saved; `stepped` is True.
            OutOfMemory: the optimizer's state does not fit.
        """
        self.stepped = False
        try:
            with self._within_memory():
                return self._step(learning_rate, num_without_loss, advantage_scale)
        finally:
            self._drop()

    def diagnosis(self) -> str:
        """One line on the last step that was skipped: what was not finite and where, and what to turn."""
        return "no update has been skipped" if self.nonfinite is None else self.nonfinite.text

    def _step(self, learning_rate: float, num_without_loss: int, advantage_scale: float) -> dict[str, float]:
        parts, epochs = self._parts(), self.config.epochs_per_update
        num_sequences = sum(part.num_sequences for part in parts)
        steps: list[list[dict[str, float]]] = [[] for _ in range(epochs)]
        figures: dict[str, float] = {}
        broken: NonFinite | None = None
        for epoch, part in itertools.product(range(epochs), parts):
            if epoch or self.config.mini_batches > 1:  # else its gradient is there already
                self._metrics = []
                for row in part.rows:
                    self._backward(row)
            scale = update_scale(
                self._normalisation,
                # A mini-batch counts its share of what has no loss.
                num_sequences=part.num_sequences + num_without_loss * part.num_sequences / max(1, num_sequences),
                num_loss_tokens=part.num_loss_tokens,
                num_prompts=len(part.prompts),
            )
            figures, broken = self._apply(scale * advantage_scale, learning_rate)
            if broken is not None:
                self.nonfinite = broken
                break
            steps[epoch].append(figures)
        taken = sum(map(len, steps))
        metrics = merge_steps([epoch for epoch in steps if epoch][-1] if taken else [figures])
        if broken is not None:
            metrics |= broken.figures
        if taken:
            metrics["changed_weights_share"] = self._changed_share()
        if epochs > 1 or self.config.mini_batches > 1:
            metrics["optimizer_steps"] = taken
            metrics["skipped_steps"] = epochs * len(parts) - taken
        metrics["skipped_update"] = float(not taken)
        metrics["micro_batches"] = self._micro_batches
        metrics["trained_tokens"] = self._represented
        metrics["forwarded_tokens"] = self._forwarded
        return metrics

    def _backward(self, row: Row) -> torch.Tensor:
        """Forward and backward of one micro-batch; its log-probs [T], detached."""
        stats = self._token_stats(
            self._policy,
            row.batch,
            temperature=self.config.temperature,
            chunk_size=self.config.logprob_chunk,
            fp32_head=self.config.fp32_head,
            compile_head=self._compile,
        )
        inputs = loss_inputs(stats, row.batch, old_logprobs=row.old, ref_logprobs=row.reference)
        output = self._loss.loss(inputs, self._loss_settings)
        output.loss.backward()
        self._metrics.append(output.metrics)
        return stats.logprobs.detach()

    def _token_stats(self, model: Any, batch: MicroBatch, **settings: Any) -> TokenStats:
        return token_logprobs(model, batch, **settings)

    def _reference_logprobs(self, batch: MicroBatch) -> torch.Tensor | None:
        return None if self._reference is None else self._logprobs(self._reference, batch)

    @torch.no_grad()
    def _logprobs(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """[T], without gradient."""
        return self._token_stats(
            model,
            batch,
            temperature=self.config.temperature,
            chunk_size=self.config.logprob_chunk,
            fp32_head=self.config.fp32_head,
            compile_head=self._compile and model is self._policy,
            with_entropy=False,
        ).logprobs

    def _apply(self, scale: float, learning_rate: float) -> tuple[dict[str, float], NonFinite | None]:
        """One optimizer step on what was accumulated, or what forbids it; the finite figures either way."""
        masters = self.masters.parameters
        gradients = self._gradients()
        torch._foreach_mul_(gradients, scale)
        norm = self._total_norm(gradients)
        columns, (grad_norm,) = self._fetch(norm)
        figures, broken = reduce_columns(columns)
        if "loss" in figures:
            figures["loss"] *= scale  # the only sum that the weights of the loss went into
        if math.isfinite(grad_norm):
            figures["grad_norm"] = grad_norm  # before it was clipped
            figures["grad_clipped"] = float(0 < self.config.max_grad_norm < grad_norm)
        if broken:
            figures["nonfinite_metrics"] = len(broken)
        finite = "loss" in figures and not columns["num_nonfinite_policy_logprobs"].any()
        if not (finite and grad_norm <= LARGEST_NORM):
            found = find_nonfinite(
                columns,
                names=self.masters.names,
                masters=masters,
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                other=broken,
                find=self._nonfinite_names,
            )
            if found.weights:  # damaged from outside: no update here does that, and none repairs it
                self.stepped = True  # the weights belong to no update, so they must not be saved
                self.nonfinite = found
                raise FloatingPointError(found.text)
            return figures, found
        torch.nn.utils.clip_grads_with_norm_(masters, self.config.max_grad_norm or math.inf, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.stepped = True
        self.masters.decay(learning_rate * self.config.weight_decay)
        self.optimizer.step()
        self._steps.append(self._publish())
        self.optimizer.zero_grad(set_to_none=True)
        return figures, None

    def _gradients(self) -> list[torch.Tensor]:
        """Of the masters that have one, the whole update's."""
        return [master.grad for master in self.masters.parameters if master.grad is not None]

    def _total_norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.get_total_norm(gradients)

    def _fetch(self, norm: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[float]]:
        """The metrics of the epoch's micro-batches, and the norm; waits for the device."""
        return fetch_metrics(self._metrics, norm)

    def _publish(self) -> Published:
        return self.masters.publish()

    def _nonfinite_names(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
        return nonfinite_names(names, tensors)

    def _changed_share(self) -> float:
        """The share of the weights that a step changed as the server is sent them, the mean of the update's steps."""
        changed, finite = (torch.stack(column) for column in zip(*self._steps, strict=True))
        num_changed, num_finite = torch.stack([changed.sum(), finite.sum()]).tolist()
        if num_finite < len(self._steps):
            names = self._nonfinite_names(self.masters.names, self.masters.parameters)
            raise FloatingPointError(
                f"a finite gradient made weights that are not finite, first {names[0] if names else 'in the copies in bf16'}: "
                "the optimizer's state is damaged; --resume from an earlier checkpoint"
            )
        return float(num_changed / (len(self._steps) * max(1, self.masters.num_trained)))

    def discard(self) -> None:
        """Forget what was accumulated of an update that will not be finished."""
        self._drop()

    def full_state(self) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
        """What a checkpoint holds: the state dict of `model` with the float32 masters, and the optimizer, whose parameters are
        in the order of the model's."""
        return self.masters.state_dict(self.model), self.optimizer

    def resume(self, folder: Path) -> None:
        """Restore the optimizer's state from a checkpoint's training folder, of which the model was loaded already.

        Raises:
            CheckpointError: the file is missing or damaged, or belongs to another model.
        """
        load_optimizer(folder, self.optimizer, model=self.model)
        self._take_own_settings()

    def _take_own_settings(self) -> None:
        for group in self.optimizer.param_groups:  # what this run was given, not what the checkpoint was made with
            group["betas"] = (self.config.adam_beta1, self.config.adam_beta2)
            group["fused"] = self.optimizer.defaults["fused"]

    def _drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._clear()

"""The half of the trainer that touches the device: samples in, gradients, one optimizer step, figures out.

An update is accumulated piece by piece, as its rollouts arrive, so that training hides behind generation. What a mean over
the update divides by is known only with its last piece: the gradient is summed undivided and scaled once, before clipping.
Nothing in here waits for the device but `step`, at its end: once for the figures that decide whether the step is taken, once
for what it did to the weights. A step with a NaN or an Inf in its loss, its log-probs or its gradient is not taken.

Left out: more than one training GPU.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ludic.config import GRPOConfig
from ludic.task.rope import pin_rope
from ludic.train.attention import checkpoint_layers, compile_layers, prepare_packed_attention
from ludic.train.logprobs import token_logprobs
from ludic.train.losses import (
    LOSSES,
    LossSettings,
    check_rollout_logprobs,
    fetch_metrics,
    loss_inputs,
    reduce_columns,
)
from ludic.train.master_weights import MasterWeights, Published, cast_parameters
from ludic.train.model_checks import check_head, check_isolation, check_mode
from ludic.train.nonfinite import LARGEST_NORM, NonFinite, find_nonfinite, nonfinite_names
from ludic.train.packing import num_loss_tokens, pack, update_scale
from ludic.types import MicroBatch, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ROW_MULTIPLE = 128
"""On a GPU, rows are padded to a multiple of this, so that compiled layers serve every length alike."""


class Learner:
    """Trains `model` on the samples of one update at a time.

    On a GPU the model computes in bf16 from then on: its parameters become rounded copies of fp32 masters.

    Args:
        model: the policy, float32, on the device that trains.
        reference_model: frozen, on the same device; needed if, and only if, `config.kl_coef` is above 0.

    Raises:
        ValueError: the model is not float32, cannot be trained on packed rows, or the reference is missing.
    """

    def __init__(
        self, config: GRPOConfig, model: "PreTrainedModel", *, reference_model: "PreTrainedModel | None" = None
    ) -> None:
        if (config.kl_coef > 0) != (reference_model is not None):
            raise ValueError("a reference model is needed if, and only if, kl_coef is above 0")
        self.config = config
        self.model = model
        self.device = next(model.parameters()).device
        self.token_budget = config.micro_token_budget or config.max_seq_len
        """Tokens of one micro-batch; with `auto` a trial raises it to what fits (see `memory`)."""
        on_gpu = self.device.type == "cuda"
        self._pad_to = ROW_MULTIPLE if on_gpu else 1
        longest_row = self.token_budget - self.token_budget % self._pad_to
        if config.micro_token_budget is not None and longest_row < config.max_seq_len:
            raise ValueError(
                f"--micro-token-budget {config.micro_token_budget} holds rows of {longest_row} tokens (a multiple of "
                f"{self._pad_to}), fewer than --max-seq-len {config.max_seq_len}: take {longest_row + self._pad_to} or more"
            )
        self._compile = config.compile and on_gpu
        self._loss = LOSSES[config.loss]
        self._loss_settings = LossSettings(
            clip_low=self._loss.clip_low if config.clip_low is None else config.clip_low,
            clip_high=self._loss.clip_high if config.clip_high is None else config.clip_high,
            kl_coef=config.kl_coef,
            tis_cap=config.importance_cap,
        )
        prepare_packed_attention(model)
        pin_rope(model, config.max_seq_len)
        compute_dtype = torch.bfloat16 if on_gpu else torch.float32
        self.masters = MasterWeights(model, compute_dtype=compute_dtype)
        check_isolation(model, max_seq_len=config.max_seq_len)
        check_head(model)
        self._reference = reference_model
        if reference_model is not None:
            prepare_packed_attention(reference_model)
            pin_rope(reference_model, config.max_seq_len)
            reference_model.requires_grad_(False)
            cast_parameters(reference_model, compute_dtype)
        if config.gradient_checkpointing:
            checkpoint_layers(model)
        check_mode(model)
        if self._compile:
            compile_layers(model)
        self.optimizer = torch.optim.AdamW(
            self.masters.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=0.0,  # not for all weights, see `_decay`
            fused=on_gpu,
        )
        self.stepped = False
        """Whether the last `step` changed the weights, also where it failed."""
        self.nonfinite: NonFinite | None = None
        """What kept the last `step` that was skipped, or cut short, from being taken."""
        self._clear()

    def _clear(self) -> None:
        self._metrics: list[Mapping[str, torch.Tensor]] = []
        self._steps: list[Published] = []
        self._rows: list[tuple[MicroBatch, torch.Tensor | None, torch.Tensor]] = []
        self._num_sequences = self._num_loss_tokens = 0
        self._forwarded = self._represented = self._micro_batches = 0

    # -- one update ------------------------------------------------------------------------------------------------

    def accumulate(self, samples: Sequence[TrainingSample]) -> None:
        """Add the gradient of some of the update's samples. Returns before the device is done.

        Raises:
            OutOfMemory: the micro-batch did not fit; the gradient is lost, the weights are untouched.
        """
        check_rollout_logprobs(samples, self._loss_settings)
        rows = pack(
            samples,
            token_budget=self.token_budget,
            normalisation=self._loss.normalisation,
            max_completion_tokens=self.config.max_completion_len or self.config.max_seq_len,
            share_prompts=self.config.share_prompts,
            scale=1.0,
            pad_to_multiple=self._pad_to,
        )
        self._num_sequences += len(samples)
        self._num_loss_tokens += num_loss_tokens(samples)
        try:
            for packed in rows:
                row = packed.to(self.device)
                self._forwarded += row.input_ids.numel()
                self._represented += row.num_sequence_tokens
                self._micro_batches += 1
                reference = self._reference_logprobs(row)
                logprobs = self._backward(row, reference=reference, old=None)
                if self.config.epochs_per_update > 1:
                    self._rows.append((row, reference, logprobs))
        except torch.OutOfMemoryError as error:
            self.discard()
            raise self._out_of_memory() from error

    def step(self, *, learning_rate: float, num_without_loss: int = 0) -> dict[str, float]:
        """End the update: scale and clip the gradient, step, and hand the new weights to the model; the update's figures.

        `num_without_loss` sequences of the update were not accumulated because their groups have no variance; the mean
        counts them where the loss's paper does.

        Where the loss, a log-prob of the policy or the gradient is not finite, the step is skipped: weights, masters and
        the optimizer's state stay as they were, to the bit. `skipped_update` is then 1.0, else 0.0; the figures are those
        that are finite, with counts of what is not, and `diagnosis` has the words. With several epochs an update, those
        before the first that is not finite stay, it and those after it are left out and counted in `skipped_epochs`.

        Raises:
            FloatingPointError: the weights are not finite: they, or the optimizer's state, were damaged from outside. They
                must not be saved; `stepped` is True.
            OutOfMemory: the optimizer's state does not fit.
        """
        self.stepped = False
        try:
            return self._step(learning_rate, num_without_loss if self._loss.counts_zero_variance else 0)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        finally:
            self.discard()

    def diagnosis(self) -> str:
        """One line on the last step that was skipped: what was not finite and where, and what to turn."""
        return "no update has been skipped" if self.nonfinite is None else self.nonfinite.describe()

    def _step(self, learning_rate: float, num_without_loss: int) -> dict[str, float]:
        scale = update_scale(
            self._loss.normalisation,
            num_sequences=self._num_sequences + num_without_loss,
            num_loss_tokens=self._num_loss_tokens,
        )
        epochs, taken = self.config.epochs_per_update, 0
        metrics: dict[str, float] = {}
        for epoch in range(epochs):
            if epoch:
                self._metrics = []
                for row, reference, old in self._rows:
                    self._backward(row, reference=reference, old=old)
            figures, broken = self._apply(scale, learning_rate)
            metrics = metrics if broken is not None and taken else figures
            if broken is not None:
                self.nonfinite = broken
                metrics |= broken.figures()
                break
            taken += 1
        if taken:
            metrics["changed_weights_share"] = self._changed_share()
        if epochs > 1:
            metrics["skipped_epochs"] = epochs - taken
        metrics["skipped_update"] = float(not taken)
        metrics["micro_batches"] = self._micro_batches
        metrics["trained_tokens"] = self._represented
        metrics["forwarded_tokens"] = self._forwarded
        return metrics

    def _backward(self, row: MicroBatch, *, reference: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor:
        """Forward and backward of one micro-batch; its log-probs [T], detached."""
        stats = token_logprobs(
            self.model,
            row,
            temperature=self.config.temperature,
            chunk_size=self.config.logprob_chunk,
            fp32_head=self.config.fp32_head,
            compile_head=self._compile,
        )
        inputs = loss_inputs(stats, row, old_logprobs=old, ref_logprobs=reference)
        output = self._loss.loss(inputs, self._loss_settings)
        output.loss.backward()
        self._metrics.append(output.metrics)
        return stats.logprobs.detach()

    @torch.no_grad()
    def _reference_logprobs(self, row: MicroBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        return token_logprobs(
            self._reference,
            row,
            temperature=self.config.temperature,
            chunk_size=self.config.logprob_chunk,
            fp32_head=self.config.fp32_head,
            with_entropy=False,
        ).logprobs

    def _apply(self, scale: float, learning_rate: float) -> tuple[dict[str, float], NonFinite | None]:
        """One optimizer step on what was accumulated, or what forbids it; the finite figures either way."""
        masters = self.masters.parameters
        gradients = [master.grad for master in masters if master.grad is not None]
        torch._foreach_mul_(gradients, scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        columns, (grad_norm,) = fetch_metrics(self._metrics, norm)
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
            )
            if found.weights:  # damaged from outside: no update here does that, and none repairs it
                self.stepped = True  # the weights belong to no update, so they must not be saved
                self.nonfinite = found
                raise FloatingPointError(found.describe())
            return figures, found
        torch.nn.utils.clip_grads_with_norm_(masters, self.config.max_grad_norm or math.inf, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.stepped = True
        self._decay(learning_rate)
        self.optimizer.step()
        self._steps.append(self.masters.publish())
        self.optimizer.zero_grad(set_to_none=True)
        return figures, None

    @torch.no_grad()
    def _decay(self, learning_rate: float) -> None:
        """AdamW's decoupled weight decay (arXiv 1711.05101) of matrices and embeddings, as is usual: norms set a scale and
        biases a place, and neither is better for being near 0.

        By hand and not by a second group of the optimizer, whose one group keeps the parameters in the model's order, as
        checkpoints do.
        """
        if self.config.weight_decay:
            decayed: list[torch.Tensor] = [
                master
                for name, master in zip(self.masters.names, self.masters.parameters, strict=True)
                if master.grad is not None and master.dim() > 1 and not name.endswith("bias")
            ]
            torch._foreach_mul_(decayed, 1 - learning_rate * self.config.weight_decay)

    def _changed_share(self) -> float:
        """The share of the weights that a step changed as the server is sent them, the mean of the update's steps."""
        changed, finite = (torch.stack(column) for column in zip(*self._steps, strict=True))
        num_changed, num_finite = torch.stack([changed.sum(), finite.sum()]).tolist()
        if num_finite < len(self._steps):
            names = nonfinite_names(self.masters.names, self.masters.parameters)
            raise FloatingPointError(
                f"a finite gradient made weights that are not finite, first {names[0] if names else 'in the copies in bf16'}: "
                "the optimizer's state is damaged; --resume from an earlier checkpoint"
            )
        return float(num_changed / (len(self._steps) * max(1, self.masters.num_trained)))

    def discard(self) -> None:
        """Forget what was accumulated of an update that will not be finished."""
        self.optimizer.zero_grad(set_to_none=True)
        self._clear()

    def _out_of_memory(self) -> "OutOfMemory":
        smallest = -(-self.config.max_seq_len // self._pad_to) * self._pad_to
        lower = max(smallest, self.token_budget // 2)
        flag = f"lower --micro-token-budget {self.token_budget} (to {lower}, say)"
        if lower >= self.token_budget:
            flag = "switch --gradient-checkpointing on, or lower --max-seq-len"
        return OutOfMemory(f"the trainer's device ran out of memory in an update: {flag}")


class OutOfMemory(MemoryError):
    """The trainer's device is too small for what was asked; the message names the flag to change."""

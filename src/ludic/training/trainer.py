"""The training loop: rollouts, advantages, packed micro-batches, one optimizer step, one weight sync; and again.

`GRPOTrainer.run` is the whole job from top to bottom. It is strictly on-policy: a batch is sampled by the policy that it
trains, and the next batch waits for the new weights. Left out: overlapping generation with training, and more than one
training GPU.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ludic.environment import Environment
from ludic.evaluation import EvaluationResult, evaluate
from ludic.inference.engine import InferenceEngine, WeightSyncReport
from ludic.prompts import encode_prompt
from ludic.rollouts import Prompt, RolloutBatch, collect_groups, derive_seed, rollout_metrics
from ludic.telemetry.jsonl import JsonlWriter
from ludic.telemetry.loggers import MetricLogger
from ludic.training.advantages import training_samples
from ludic.training.attention import check_isolation, compile_layers, prepare_packed_attention
from ludic.training.checkpoint import CheckpointError, TrainerState, load_optimizer, save_checkpoint
from ludic.training.config import GRPOConfig, RunPaths
from ludic.training.losses import LOSSES, LossSettings, check_head, loss_inputs, reduce_metrics, token_logprobs
from ludic.training.packing import pack
from ludic.types import MicroBatch, SamplingParams, TrainingSample

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SampleT = TypeVar("SampleT")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSummary:
    """What a run did. Accuracies are fractions of 1 under the flexible rule, None where nothing was evaluated."""

    accuracy_before: float | None
    accuracy_after: float | None
    eval_problems: int
    updates: int
    seconds: float
    rollouts: int
    completion_tokens: int
    last_checkpoint: str | None
    evaluations: list[dict[str, Any]]
    """Every evaluation's figures with its `step`."""


class GRPOTrainer(Generic[SampleT]):
    """Trains `model` with GRPO on the samples of one environment.

    The model's parameters must be float32: they are the master weights, and bf16 is for compute and for the wire only.

    Args:
        model: the policy, on the device that trains.
        reference_model: frozen, on the same device; needed if `config.kl_coef` is above 0.
        engine: generates with its own copy of the weights, which every update replaces.
        resume_from: a checkpoint of this run, whose model was already loaded into `model`.

    Raises:
        ValueError: a prompt is too long, there is no data, or the model cannot be trained packed.
    """

    def __init__(
        self,
        *,
        config: GRPOConfig,
        model: "PreTrainedModel",
        model_name: str,
        tokenizer: "PreTrainedTokenizerBase",
        engine: InferenceEngine,
        environment: Environment[SampleT],
        train_samples: Sequence[SampleT],
        eval_samples: Sequence[SampleT],
        metric_logger: MetricLogger,
        paths: RunPaths,
        eval_concurrency: int = 256,
        eval_max_tokens: int | None = None,
        model_dtype: torch.dtype = torch.float32,
        reference_model: "PreTrainedModel | None" = None,
        resume_from: "tuple[Path, TrainerState] | None" = None,
    ) -> None:
        if not train_samples:
            raise ValueError("there are no samples to train on")
        if (config.kl_coef > 0) != (reference_model is not None):
            raise ValueError("a reference model is needed if, and only if, kl_coef is above 0")
        wrong = next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is not float32: load the policy with dtype=torch.float32, its masters must be")
        self.config = config
        self.model = model
        self.reference_model = reference_model
        self.tokenizer = tokenizer
        self.engine = engine
        self.environment = environment
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.metric_logger = metric_logger
        self.paths = paths
        self._eval_concurrency = eval_concurrency
        self._eval_max_tokens = eval_max_tokens
        self._model_dtype = model_dtype
        self._device = next(model.parameters()).device
        self._prompt_token_ids = self._tokenise(train_samples)
        self._settings = {**dataclasses.asdict(config), "num_train_samples": len(train_samples)}

        disable_dropout(model)
        prepare_packed_attention(model)
        with (
            self._autocast()
        ):  # two proofs that cost milliseconds: no leak between packed sequences, the model's own logits
            check_isolation(model)
            check_head(model)
        if reference_model is not None:
            prepare_packed_attention(reference_model)
            reference_model.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._compile = config.compile and self._device.type == "cuda"
        if self._compile:
            compile_layers(model)
        model.train()
        self._loss = LOSSES[config.loss]
        self._loss_settings = LossSettings(
            clip_low=self._loss.clip_low if config.clip_low is None else config.clip_low,
            clip_high=self._loss.clip_high if config.clip_high is None else config.clip_high,
            kl_coef=config.kl_coef,
            tis_cap=config.tis_cap or None,
        )
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=self._device.type == "cuda",
        )
        self.state = TrainerState(step=0, policy_version=0, model=model_name, config=self._settings)
        self.last_checkpoint: Path | None = None
        self._mid_update = False
        self._saved_step = 0
        self._started, self._seconds_before = time.perf_counter(), 0.0
        if resume_from is not None:
            self.last_checkpoint, state = resume_from
            check_same_data_order(state, self._settings)
            load_optimizer(self.last_checkpoint, self.optimizer, self._device)
            for group in self.optimizer.param_groups:  # what this run was given, not what the checkpoint was made with
                group["betas"], group["weight_decay"] = (config.adam_beta1, config.adam_beta2), config.weight_decay
            self.state = dataclasses.replace(state, config=self._settings)

    # -- the loop --------------------------------------------------------------------------------------------------

    async def run(self) -> TrainingSummary:
        """Train until `config.train_steps` updates are done.

        Whatever ends it early, a cancellation or an error, a checkpoint of the last finished update is written first.
        """
        config = self.config
        self._started, self._seconds_before = time.perf_counter(), self.state.seconds
        self._saved_step = self.state.step
        with JsonlWriter(self.paths.rollouts) as rollout_writer:
            try:
                await self._sync_weights()
                if not self.state.evaluations:
                    await self._evaluate()
                while self.state.step < config.train_steps:
                    await self._update(rollout_writer)
                    done = self.state.step == config.train_steps
                    if done or (config.eval_every and self.state.step % config.eval_every == 0):
                        await self._evaluate()
                    if done or (config.save_every and self.state.step % config.save_every == 0):
                        self.save()
                if self._owes_evaluation():  # an earlier run was cut off in its last evaluation
                    await self._evaluate()
                    self.save()
            except CheckpointError:
                raise
            except BaseException:
                if self.state.step > self._saved_step and not self._mid_update:
                    logger.warning("stopping at update %d; writing a checkpoint first", self.state.step)
                    self.save()
                raise
        return self._summary()

    async def _update(self, rollout_writer: JsonlWriter) -> None:
        """One step: sample and score, train, hand the weights over, log."""
        started = time.perf_counter()
        batch = await collect_groups(
            self.engine,
            self.environment,
            self._prompts(self.state.step),
            group_size=self.config.group_size,
            tokenizer=self.tokenizer,
            step=self.state.step + 1,
            writer=rollout_writer,
        )
        train_started = time.perf_counter()
        metrics = self._train_on(batch)
        train_s = time.perf_counter() - train_started
        report: WeightSyncReport | None = None
        try:
            report = await self._sync_weights()
        finally:  # the update is done and counted, so it is logged, whatever became of the sync
            rollout_writer.flush()
            self._log_step(metrics, batch, report, train_s=train_s, step_s=time.perf_counter() - started)

    def _prompts(self, step: int) -> list[Prompt[SampleT]]:
        """The prompts of one update: the data in a fresh random order each epoch, cut into updates without a gap."""
        config = self.config
        prompts = []
        for group_id in range(step * config.groups_per_update, (step + 1) * config.groups_per_update):
            epoch, place = divmod(group_id, len(self.train_samples))
            index = self._epoch_order(epoch)[place]
            token_ids = self._prompt_token_ids[index]
            sampling = SamplingParams(
                temperature=config.temperature,
                max_tokens=config.completion_cap(len(token_ids)),
                seed=derive_seed(config.seed, step, group_id),
            )
            prompts.append(
                Prompt(group_id=group_id, sample=self.train_samples[index], token_ids=token_ids, sampling=sampling)
            )
        return prompts

    def _epoch_order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, epoch))
        order: list[int] = torch.randperm(len(self.train_samples), generator=generator).tolist()
        return order

    # -- one update ------------------------------------------------------------------------------------------------

    def _train_on(self, batch: RolloutBatch) -> dict[str, float]:
        """Turn one batch of groups into optimizer steps; the metrics of the update."""
        config = self.config
        metrics = rollout_metrics(batch.groups, policy_version=self.state.policy_version)
        scale = config.loss != "dr_grpo" if config.scale_rewards is None else config.scale_rewards
        samples, stats = training_samples(batch.groups, scale_rewards=scale, mask_truncated=config.mask_truncated)
        metrics["zero_variance_groups"] = stats.num_zero_variance_groups
        metrics["zero_variance_share"] = stats.num_zero_variance_groups / max(stats.num_groups, 1)
        metrics["truncated_masked"] = stats.num_truncated_masked
        metrics["trained_sequences"] = stats.num_samples
        learning_rate = self._set_learning_rate()
        if samples:
            metrics |= self._optimise(samples)
        else:
            cut_off = f", and {stats.num_truncated_masked} completions were cut off and masked" * bool(
                stats.num_truncated_masked
            )
            logger.warning(
                "update %d: nothing to learn from: %d of %d groups have no variance in their rewards%s",
                self.state.step + 1,
                stats.num_zero_variance_groups,
                stats.num_groups,
                cut_off,
            )
        metrics["learning_rate"] = learning_rate
        rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            policy_version=self.state.policy_version + 1,
            rollouts=self.state.rollouts + len(rollouts),
            completion_tokens=self.state.completion_tokens + sum(len(r.completion.token_ids) for r in rollouts),
            seconds=self._seconds_before + time.perf_counter() - self._started,
        )
        self._mid_update = False
        return metrics

    def _optimise(self, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """`epochs_per_update` optimizer steps on the samples. Nothing in here waits for the device but the last line."""
        config = self.config
        packed = pack(
            samples,
            token_budget=config.micro_token_budget,
            normalisation=self._loss.normalisation,
            max_completion_tokens=config.max_completion_len or config.max_seq_len,
        )
        num_loss_tokens = [int(row.loss_mask.sum()) for row in packed]
        rows = [row.to(self._device) for row in packed]
        ref_logprobs = self._reference_logprobs(rows, num_loss_tokens)
        old_logprobs: list[torch.Tensor | None] = [None] * len(rows)
        collected: list[Mapping[str, torch.Tensor]] = []
        grad_norm = torch.zeros(())
        for epoch in range(config.epochs_per_update):
            collected = []
            for index, row in enumerate(rows):
                with self._autocast():
                    stats = token_logprobs(
                        self.model,
                        row,
                        temperature=config.temperature,
                        chunk_size=config.logprob_chunk,
                        compile_head=self._compile,
                        num_loss_tokens=num_loss_tokens[index],
                    )
                inputs = loss_inputs(stats, row, old_logprobs=old_logprobs[index], ref_logprobs=ref_logprobs[index])
                output = self._loss.loss(inputs, self._loss_settings)
                output.loss.backward()
                collected.append(output.metrics)
                if epoch == 0 and config.epochs_per_update > 1:
                    old_logprobs[index] = stats.logprobs.detach()
            max_norm = config.max_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
            if not torch.isfinite(grad_norm):
                self.optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(
                    f"the gradient of update {self.state.step + 1} is not finite (norm {grad_norm.item()}); the policy was "
                    "left as it was before. A lower --learning-rate, or --tis-cap, is what helps most often"
                )
            self._mid_update = True  # until the update is counted, the weights belong to no step
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        metrics = _named(reduce_metrics(collected))
        metrics["grad_norm"] = grad_norm.item()
        metrics["micro_batches"] = len(rows)
        metrics["trained_tokens"] = sum(len(sample.token_ids) for sample in samples)
        return metrics

    @torch.no_grad()
    def _reference_logprobs(
        self, rows: Sequence[MicroBatch], num_loss_tokens: Sequence[int]
    ) -> list[torch.Tensor | None]:
        if self.reference_model is None:
            return [None] * len(rows)
        logprobs: list[torch.Tensor | None] = []
        for row, count in zip(rows, num_loss_tokens, strict=True):
            with self._autocast():
                stats = token_logprobs(
                    self.reference_model,
                    row,
                    temperature=self.config.temperature,
                    chunk_size=self.config.logprob_chunk,
                    with_entropy=False,
                    num_loss_tokens=count,
                )
            logprobs.append(stats.logprobs)
        return logprobs

    def _autocast(self) -> torch.autocast:
        """bf16 compute over fp32 masters on CUDA; fp32 throughout on the CPU."""
        return torch.autocast("cuda", dtype=torch.bfloat16, enabled=self._device.type == "cuda")

    def _set_learning_rate(self) -> float:
        learning_rate = self.config.learning_rate * schedule_factor(self.config, self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    # -- weights, evaluation, checkpoints, log ---------------------------------------------------------------------

    async def _sync_weights(self) -> WeightSyncReport:
        report = await self.engine.update_weights(self.model, policy_version=self.state.policy_version)
        logger.info("weight sync %d: %.3f s, %s", report.policy_version, report.seconds, report.proof)
        return report

    async def _evaluate(self) -> None:
        config = self.config
        if not (config.eval_limit and self.eval_samples):
            return
        samples = self.eval_samples[: config.eval_limit]
        max_tokens = self._eval_max_tokens or config.max_completion_len or config.max_seq_len
        result: EvaluationResult = await evaluate(
            self.engine,
            self.environment,
            samples,
            tokenizer=self.tokenizer,
            sampling=SamplingParams(
                temperature=config.eval_temperature,
                max_tokens=max_tokens,
                seed=derive_seed(config.seed, self.state.step),
            ),
            concurrency=self._eval_concurrency,
            max_seq_len=config.max_seq_len,
        )
        summary = result.to_summary(model=self.state.model, settings={})
        self.state = dataclasses.replace(
            self.state, evaluations=[*self.state.evaluations, {"step": self.state.step, **summary}]
        )
        self.metric_logger.log(self.state.step, {f"eval/{name}": float(str(summary[name])) for name in _EVAL_METRICS})

    def _owes_evaluation(self) -> bool:
        evaluates = bool(self.config.eval_limit and self.eval_samples)
        return evaluates and self.state.evaluations[-1]["step"] != self.state.step

    def save(self) -> "Path":
        """Write a checkpoint of the last finished update.

        Raises:
            CheckpointError: it could not be written; the last good one is still there.
        """
        self.last_checkpoint = save_checkpoint(
            self.paths.checkpoints,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            state=self.state,
            model_dtype=self._model_dtype,
            keep=self.config.keep_checkpoints,
        )
        self._saved_step = self.state.step
        return self.last_checkpoint

    def _log_step(
        self,
        metrics: dict[str, float],
        batch: RolloutBatch,
        report: WeightSyncReport | None,
        *,
        train_s: float,
        step_s: float,
    ) -> None:
        figures = dict(metrics)
        figures |= {
            "policy_version": self.state.policy_version,
            "generation_s": batch.generation_s,
            "grading_s": batch.grading_s,
            "train_s": train_s,
            "step_s": step_s,
            "tokens_per_s": metrics["total_completion_tokens"] / step_s,
            "train_tokens_per_s": metrics.get("trained_tokens", 0.0) / train_s,
        }
        if report is not None:
            figures["sync_s"] = report.seconds
            figures |= {f"sync/{name}_s": seconds for name, seconds in report.phases_s.items()}
            if report.logprob_gap is not None:
                figures["sync/logprob_gap"] = report.logprob_gap
        self.metric_logger.log(self.state.step, figures)

    def _summary(self) -> TrainingSummary:
        evaluations: list[dict[str, Any]] = self.state.evaluations
        before = evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None
        after = evaluations[-1] if evaluations and evaluations[-1]["step"] == self.state.step > 0 else None
        return TrainingSummary(
            accuracy_before=before["accuracy"] if before else None,
            accuracy_after=after["accuracy"] if after else None,
            eval_problems=evaluations[0]["num_problems"] if evaluations else 0,
            updates=self.state.step,
            seconds=self.state.seconds,
            rollouts=self.state.rollouts,
            completion_tokens=self.state.completion_tokens,
            last_checkpoint=str(self.last_checkpoint) if self.last_checkpoint else None,
            evaluations=evaluations,
        )

    def _tokenise(self, samples: Sequence[SampleT]) -> list[list[int]]:
        """Every prompt's token ids, once for the whole run.

        Raises:
            ValueError: one of them is longer than `max_seq_len` allows, with its place and length.
        """
        token_ids = []
        for index, sample in enumerate(samples):
            ids = encode_prompt(self.tokenizer, self.environment.messages(sample))
            if len(ids) > self.config.max_prompt_len:
                raise ValueError(
                    f"the prompt of training sample {index} is {len(ids)} tokens, more than --max-seq-len "
                    f"{self.config.max_seq_len} allows with one token for an answer"
                )
            token_ids.append(ids)
        return token_ids


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to 0: the trainer's log-probs must be those of the policy that sampled, in training mode too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):  # attention keeps its own in either place
            if isinstance(getattr(holder, "attention_dropout", None), float):
                setattr(holder, "attention_dropout", 0.0)  # noqa: B010  # a module's attributes are tensors to the checker


def check_same_data_order(state: TrainerState, settings: Mapping[str, Any]) -> None:
    """A resumed run finds its place in the data from the update's number, so what that depends on must not change.

    Raises:
        ValueError: one of those settings is another than the checkpoint's; names it and both values.
    """
    for name in ("seed", "rollouts_per_update", "group_size", "num_train_samples"):
        if state.config.get(name, settings[name]) != settings[name]:
            what = "the number of training samples" if name == "num_train_samples" else "--" + name.replace("_", "-")
            raise ValueError(
                f"the checkpoint was made with {what} {state.config[name]}, this run has {settings[name]}: with another, "
                "prompts would be repeated or skipped; resume with the same, or start a run with --model CHECKPOINT"
            )


def schedule_factor(config: GRPOConfig, step: int) -> float:
    """What the peak learning rate is multiplied by in update `step` (from 0): a linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.lr_schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, config.train_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


_METRIC_NAMES = {"logprob_gap_mean": "logprob_gap"}
_EVAL_METRICS = ("accuracy", "strict_accuracy", "qwen_accuracy", "correct_rate", "parse_err_rate", "truncation_rate",
                 "avg_completion_length", "num_problems", "seconds")  # fmt: skip


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """The loss's metrics under their names in the log; `kl` is to the reference policy, else to the sampler."""
    named = {_METRIC_NAMES.get(name, name): value for name, value in metrics.items()}
    named["kl"] = named.get("kl_ref", named.get("kl_rollout", named.get("kl_old", 0.0)))
    return named

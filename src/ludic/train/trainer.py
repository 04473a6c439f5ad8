"""The training loop: rollouts, advantages, packed micro-batches, one optimizer step, one weight sync; and again.

`GRPOTrainer.run` is the whole job from top to bottom. Rollouts are generated up to `max_staleness` updates ahead of the
policy; with 0, the default, each batch is sampled by the very policy that it trains. Either way training starts with the
first groups that arrive, while the others are still being generated.

An update that is not finite is skipped and counted. The learner's thread owns the model and its version: an engine that has
to send the weights again, to a server that was lost, asks that thread for the pair, and nothing of it is seen here.

Reproducible where generation happens in this process: the learner then waits for the whole batch and takes it in the order
of its prompts. With a server, what is trained on in which micro-batch depends on who answers first.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ludic.config import GRPOConfig, RunPaths
from ludic.rollout.engine import InferenceEngine, WeightSyncReport
from ludic.rollout.evaluation import EvaluationResult, evaluate
from ludic.rollout.groups import GroupStream, Prompt, derive_seed, rollout_metrics
from ludic.rollout.problems import problems_digest
from ludic.storage.jsonl import JsonlWriter
from ludic.task.environment import Environment
from ludic.task.pretrained import serving_files
from ludic.task.prompts import load_tokenizer
from ludic.train.advantages import training_samples
from ludic.train.checkpoint import (
    CheckpointError,
    TrainerState,
    load_optimizer,
    save_checkpoint,
    training_folder,
)
from ludic.train.inputs import check_task, name_of, prompt_token_ids
from ludic.train.learner import Learner
from ludic.train.learner_thread import LearnerThread, to_its_end
from ludic.train.memory import fit_budget
from ludic.train.metrics import JsonlLogger, MetricLogger
from ludic.train.schedule import DataOrder, check_same_data_order, schedule_factor
from ludic.train.summary import TrainingSummary, summarise
from ludic.train.update_batch import UpdateBatch, named
from ludic.types import RolloutGroup, SamplingParams, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SampleT = TypeVar("SampleT")

ENOUGH_TOKENS = 12_288
"""Tokens of sequences that are worth a micro-batch while others are still being generated. Less would keep the GPU waiting
for its host, more would be left to do when the last rollout is there."""

MAX_SKIPPED = 3
"""This many consecutive updates with a NaN or an infinity end the run: it would not recover."""


class GRPOTrainer(Generic[SampleT]):
    """Trains `model` with GRPO on the samples of one environment.

    The model's parameters must be float32: they are the master weights, and bf16 is for compute and for the wire only.

    Args:
        model: the policy, on the device that trains.
        engine: generates with its own copy of the weights, which every update replaces.
        model_name: folder or hub name, kept in checkpoints; by default the one that `model` was loaded from.
        tokenizer: by default that of `model_name`.
        metric_logger: by default the metrics file alone, without alarms; `make_logger` has both and a terminal.
        paths: by default files in this folder, named after the environment's class in lower case.
        train_prompts: the token ids of each training sample's prompt, where they are known already.
        reference_model: frozen, on the same device; needed if `config.kl_coef` is above 0.
        resume_from: a checkpoint of this run, whose model was already loaded into `model`.
        task: further settings of the run (data set, prompt), kept in its checkpoints so that a resume can compare them.
        wandb_run_id: kept there too, so that a resumed run goes on with it.

    On a GPU the model computes in bf16 from then on; `learner.masters` has its float32 weights.

    Raises:
        ValueError: a prompt is too long, there is no data, the model has no name, or it cannot be trained packed.

    Example:
        >>> trainer = GRPOTrainer(config=config, model=model, engine=engine, environment=Sums(), train_samples=sums)
        >>> summary = asyncio.run(trainer.run())
    """

    def __init__(
        self,
        *,
        config: GRPOConfig,
        model: "PreTrainedModel",
        engine: InferenceEngine,
        environment: Environment[SampleT],
        train_samples: Sequence[SampleT],
        eval_samples: Sequence[SampleT] = (),
        model_name: str | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        metric_logger: MetricLogger | None = None,
        paths: RunPaths | None = None,
        train_prompts: Sequence[list[int]] | None = None,
        eval_concurrency: int = 256,
        eval_max_tokens: int | None = None,
        model_dtype: torch.dtype = torch.float32,
        reference_model: "PreTrainedModel | None" = None,
        resume_from: "tuple[Path, TrainerState] | None" = None,
        task: Mapping[str, Any] | None = None,
        wandb_run_id: str | None = None,
    ) -> None:
        if not train_samples:
            raise ValueError("there are no samples to train on")
        model_name = model_name or name_of(model)
        tokenizer = load_tokenizer(model_name) if tokenizer is None else tokenizer
        check_task(task or {}, config)
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        self.environment = environment
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.paths = paths or RunPaths(out_dir=Path(), name=type(environment).__name__.lower())
        self._eval_concurrency = eval_concurrency
        self._eval_settings: dict[str, Any] = {
            "problems": problems_digest(eval_samples[: config.eval_limit], environment, tokenizer),
            "temperature": config.eval_temperature,
            "max_tokens": eval_max_tokens or config.max_completion_len or config.max_seq_len,
            "max_seq_len": config.max_seq_len,
        }
        self._model_dtype = model_dtype
        self._source_files = serving_files(model_name)
        self._prompt_token_ids = prompt_token_ids(
            train_samples,
            train_prompts,
            environment,
            tokenizer,
            max_len=config.max_prompt_len,
            max_seq_len=config.max_seq_len,
        )
        self._order = DataOrder(seed=config.seed, num_samples=len(train_samples))
        self._settings = {**dataclasses.asdict(config), "num_train_samples": len(train_samples)}
        self.learner = Learner(config, model, reference_model=reference_model)
        self.state = TrainerState(step=0, policy_version=0, model=model_name, config=self._settings)
        self.last_checkpoint: Path | None = None
        self._started, self._seconds_before = time.perf_counter(), 0.0
        if resume_from is not None:
            self._take_up(*resume_from)
        self.state = dataclasses.replace(
            self.state, task=dict(task or {}), wandb_run_id=wandb_run_id or self.state.wandb_run_id
        )
        self._saved = self.state
        self._own_logger: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if metric_logger is None:
            metric_logger = JsonlLogger(self.paths.metrics)
            self._own_logger = contextlib.closing(metric_logger)
        self.metric_logger: MetricLogger = metric_logger

    def _take_up(self, checkpoint: Path, state: TrainerState) -> None:
        """Go on from a checkpoint whose model is loaded already."""
        check_same_data_order(state, self._settings)
        optimizer = self.learner.optimizer
        load_optimizer(training_folder(checkpoint), optimizer, model=self.model)
        for group in optimizer.param_groups:  # what this run was given, not what the checkpoint was made with
            group["betas"] = (self.config.adam_beta1, self.config.adam_beta2)
            group["fused"] = optimizer.defaults["fused"]
        self.last_checkpoint = checkpoint
        self.state = dataclasses.replace(state, config=self._settings)

    # -- the loop --------------------------------------------------------------------------------------------------

    async def run(self) -> TrainingSummary:
        """Train until `config.train_steps` updates are done.

        Whatever ends it early, a cancellation or an error, a checkpoint of the last finished update is written first.
        """
        async with self._running():
            await self._sync()
            await self._evaluate_if_due()
            await self._fit_budget()
            while self.state.step < self.config.train_steps:
                self._submit_rollouts()
                batch = await self._collect()  # trains on groups as they arrive
                async with self._logged(batch):
                    await self._policy.turn()
                    await to_its_end(self._step(batch))
                    batch.report = await self._sync()
                await self._evaluate_if_due()
                await self._checkpoint_if_due()
            await self._checkpoint_if_due()  # of an evaluation that an earlier run was cut off in
        return summarise(self.state, self.last_checkpoint)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """The run's thread, record of rollouts and generation ahead; at an early end, its last checkpoint."""
        self._started, self._seconds_before = time.perf_counter(), self.state.seconds
        with (
            self._own_logger,
            JsonlWriter(self.paths.rollouts) as self._writer,
            LearnerThread(self.learner, self.state.policy_version) as self._policy,
        ):
            self._rollouts = GroupStream(
                self.engine,
                self.environment,
                group_size=self.config.group_size,
                tokenizer=self.tokenizer,
                writer=self._writer,
            )
            try:
                yield
            except CheckpointError:
                raise
            except BaseException:
                try:
                    await self._rollouts.aclose()  # with it a recovery's sync, which would hold up the save
                finally:  # also where a second cancellation cuts that short
                    await self._save_last_update()
                raise
            finally:
                await self._rollouts.aclose()

    async def _save_last_update(self) -> None:
        # Weights whose version is not the counted one belong to an update that failed half way.
        if self.state.step > self._saved.step and self._policy.version == self.state.policy_version:
            logger.warning("stopping at update %d; writing a checkpoint first", self.state.step)
            await self.save()

    # -- one update ------------------------------------------------------------------------------------------------

    async def _fit_budget(self) -> None:
        """Find out what fits the device, while the first rollouts are generated."""
        if self.state.step < self.config.train_steps:
            if self.engine.overlaps_training:
                self._submit_rollouts()
            await self._policy.call(fit_budget, self.learner)

    def _submit_rollouts(self) -> None:
        """Start the rollouts of the next update, and of as many after it as the staleness allows.

        An engine whose runs repeat bit for bit does not generate beyond the next checkpoint: what is resumed from it has
        nothing but the policy of that moment, and must give the same result.
        """
        step, config = self.state.step + 1, self.config
        last = min(step + config.max_staleness, config.train_steps)
        if config.save_every and not self.engine.overlaps_training:
            last = min(last, -(-step // config.save_every) * config.save_every)
        for ahead in range(step, last + 1):
            self._rollouts.submit(ahead, self._prompts(ahead - 1))

    def _prompts(self, step: int) -> list[Prompt[SampleT]]:
        """The prompts of the update after `step` updates."""
        config = self.config
        prompts = []
        for group_id in range(step * config.groups_per_update, (step + 1) * config.groups_per_update):
            index = self._order.index(group_id)
            token_ids = self._prompt_token_ids[index]
            sampling = SamplingParams(
                temperature=config.temperature,
                max_tokens=config.completion_cap(len(token_ids)),
                seed=derive_seed(config.seed, step, group_id),
                logprobs=config.wants_logprobs(group_id),
            )
            prompts.append(
                Prompt(group_id=group_id, sample=self.train_samples[index], token_ids=token_ids, sampling=sampling)
            )
        return prompts

    async def _collect(self) -> UpdateBatch:
        """Wait for the groups of the next update, and accumulate the gradient of those that are there meanwhile."""
        self.learner.discard()  # what an update that failed may have left
        batch, pending = UpdateBatch(), list[TrainingSample]()
        enough = min(self.learner.token_budget, ENOUGH_TOKENS)
        waiting_since = time.perf_counter()
        async for groups in self._rollouts.groups(self.state.step + 1):
            batch.wait_s += time.perf_counter() - waiting_since
            batch.groups += groups
            if self.engine.overlaps_training:
                pending += [sample for group in groups for sample in self._samples(batch, group)]
                if sum(len(sample.token_ids) for sample in pending) >= enough:
                    await self._accumulate(batch, pending)
                    pending = []
            waiting_since = time.perf_counter()
        batch.wait_s += time.perf_counter() - waiting_since
        batch.groups.sort(key=lambda group: group.group_id)
        if not self.engine.overlaps_training:
            pending = [sample for group in batch.groups for sample in self._samples(batch, group)]
        await self._accumulate(batch, pending)
        batch.times = self._rollouts.timings(self.state.step + 1)
        return batch

    def _samples(self, batch: UpdateBatch, group: RolloutGroup) -> list[TrainingSample]:
        """What there is to train on in one group: nothing if it has become too old, or all its rewards are alike and there
        is no KL penalty."""
        config = self.config
        age = self.state.policy_version - min(rollout.completion.policy_version for rollout in group.rollouts)
        if age > config.max_staleness:
            batch.num_too_old += 1
            return []
        scale = config.loss != "dr_grpo" if config.scale_rewards is None else config.scale_rewards
        samples, stats = training_samples(
            [group],
            scale_rewards=scale,
            mask_truncated=config.mask_truncated,
            keep_zero_variance=config.kl_coef > 0,
        )
        batch.stats.append(stats)
        if config.importance_cap is not None:  # a ratio cannot be corrected without the sampler's log-probs
            with_logprobs = [sample for sample in samples if sample.rollout_logprobs is not None]
            batch.num_without_logprobs += len(samples) - len(with_logprobs)
            return with_logprobs
        return samples

    async def _accumulate(self, batch: UpdateBatch, samples: Sequence[TrainingSample]) -> None:
        if samples:
            started = time.perf_counter()
            await self._policy.call(self.learner.accumulate, samples)
            batch.train_s += time.perf_counter() - started

    async def _step(self, batch: UpdateBatch) -> None:
        """Step the optimizer and count the update, whole or not at all."""
        metrics = rollout_metrics(batch.groups, policy_version=self.state.policy_version)
        metrics |= batch.counts()
        metrics["learning_rate"] = self.config.learning_rate * schedule_factor(self.config, self.state.step)
        if metrics["trained_sequences"]:
            started = time.perf_counter()
            try:
                figures = await self._policy.step(
                    learning_rate=metrics["learning_rate"],
                    num_without_loss=sum(stats.num_without_loss for stats in batch.stats),
                )
            except (FloatingPointError, MemoryError) as error:
                raise type(error)(f"update {self.state.step + 1}: {error}") from error
            metrics |= named(figures)
            batch.train_s += time.perf_counter() - started
        elif batch.num_without_logprobs:
            raise ValueError(
                f"the engine returned no log-probs for any of {batch.num_without_logprobs} sequences, and --tis-cap "
                f"{self.config.importance_cap} corrects with them; --tis-cap 0 trains without the correction"
            )
        else:
            logger.warning("update %d: nothing to learn from: %s", self.state.step + 1, batch.why_nothing_was_learned())
            await self._policy.skip_step()
        rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
        skipped = int(metrics.get("skipped_update", 0))  # absent where there was nothing to train on
        self.state = dataclasses.replace(
            self.state,
            skipped_updates=self.state.skipped_updates + skipped,
            skipped_in_a_row=self.state.skipped_in_a_row + skipped if metrics.get("skipped_update", 1) else 0,
            step=self.state.step + 1,
            policy_version=self.state.policy_version + 1,
            rollouts=self.state.rollouts + len(rollouts),
            completion_tokens=self.state.completion_tokens + sum(len(r.completion.token_ids) for r in rollouts),
            seconds=self._seconds_before + time.perf_counter() - self._started,
        )
        batch.metrics = metrics

    def _tell_of_skipped_update(self) -> None:
        """Log why the update was skipped.

        Raises:
            FloatingPointError: it is the third in a row.
        """
        step, in_a_row = self.state.step, self.state.skipped_in_a_row
        diagnosis = self.learner.diagnosis()
        self.metric_logger.event(step, f"update {step} was skipped: {diagnosis}")
        if in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"updates {step - in_a_row + 1} to {step} were not finite and were skipped; the weights are those of before. "
                f"{diagnosis}"
            )

    # -- weights, evaluation, checkpoints, log ---------------------------------------------------------------------

    async def _sync(self) -> WeightSyncReport:
        report = await self.engine.update_weights(self._policy)
        logger.info("weight sync %d: %.3f s, %s", report.policy_version, report.seconds, report.proof)
        return report

    async def _evaluate_if_due(self) -> None:
        if self._evaluation_is_due():
            await self._evaluate()

    def _evaluation_is_due(self) -> bool:
        config, step, evaluations = self.config, self.state.step, self.state.evaluations
        if not (config.eval_limit and self.eval_samples):
            return False
        if not evaluations:
            return True
        last = evaluations[-1]
        if step < config.train_steps and last.get("settings") != self._eval_settings:
            return True  # a resumed run was given other settings: later ones could not be compared with the last
        due = step in (0, config.train_steps) or (config.eval_every and step % config.eval_every == 0)
        return bool(due and last["step"] != step)

    async def _evaluate(self) -> None:
        config = self.config
        result: EvaluationResult = await evaluate(
            self.engine,
            self.environment,
            self.eval_samples[: config.eval_limit],
            tokenizer=self.tokenizer,
            sampling=SamplingParams(
                temperature=config.eval_temperature,
                max_tokens=self._eval_settings["max_tokens"],
                seed=derive_seed(config.seed, self.state.step),
            ),
            concurrency=self._eval_concurrency,
            max_seq_len=config.max_seq_len,
        )
        summary = result.to_summary(model=self.state.model, settings=self._eval_settings)
        self.state = dataclasses.replace(
            self.state, evaluations=[*self.state.evaluations, {"step": self.state.step, **summary}]
        )
        self.metric_logger.log(self.state.step, {f"eval/{name}": float(str(summary[name])) for name in _EVAL_METRICS})

    async def _checkpoint_if_due(self) -> None:
        config, step = self.config, self.state.step
        due = step == config.train_steps or (config.save_every and step % config.save_every == 0)
        if due and self.state is not self._saved:
            await self.save()

    async def save(self) -> "Path":
        """Write a checkpoint of the last finished update; a cancellation waits until it is there.

        Raises:
            CheckpointError: it could not be written; the last good one is still there.
        """
        return await to_its_end(self._save())

    async def _save(self) -> "Path":
        self.last_checkpoint = await self._policy.call(
            save_checkpoint,
            self.paths.checkpoints,
            model=self.model,
            weights=self.learner.masters.state_dict(self.model),
            tokenizer=self.tokenizer,
            optimizer=self.learner.optimizer,
            state=self.state,
            model_dtype=self._model_dtype,
            source_files=self._source_files,
            keep=self.config.keep_checkpoints,
        )
        self._saved = self.state
        return self.last_checkpoint

    @contextlib.asynccontextmanager
    async def _logged(self, batch: UpdateBatch) -> AsyncIterator[None]:
        """An update that was counted is logged, whatever becomes of its sync."""
        try:
            yield
        finally:
            if batch.metrics:
                self._log(batch)
        await asyncio.to_thread(self._writer.flush)
        if batch.metrics.get("skipped_update"):
            self._tell_of_skipped_update()

    def _log(self, batch: UpdateBatch) -> None:
        figures = batch.figures() | {"policy_version": self.state.policy_version} | self.engine.counts()
        self.metric_logger.log(self.state.step, figures)


_EVAL_METRICS = ("accuracy", "strict_accuracy", "qwen_accuracy", "correct_rate", "parse_err_rate", "truncation_rate",
                 "avg_completion_length", "num_problems", "seconds")  # fmt: skip

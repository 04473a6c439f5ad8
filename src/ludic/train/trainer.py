"""The training loop: rollouts, advantages, packed micro-batches, one optimizer step, one weight sync; and again.

`GRPOTrainer.run` is the whole job from top to bottom. Rollouts are generated up to `max_staleness` updates ahead of the
policy; with 0, the default, each batch is sampled by the very policy that it trains. Either way training starts with the
first groups that arrive, while the others are still being generated.

The learner's thread owns the model and its version. An engine that generates in this process gives runs that repeat bit for
bit: the learner then waits for the whole batch, and takes it in the order of its prompts.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from ludic.config import GRPOConfig, RunPaths
from ludic.rollout.engine import InferenceEngine, WeightSyncReport
from ludic.rollout.evaluation import EvaluationResult, evaluate
from ludic.rollout.groups import GroupStream, rollout_metrics
from ludic.rollout.overlong import overlong_shaping
from ludic.rollout.problems import problems_digest
from ludic.rollout.seeds import derive_seed
from ludic.storage.jsonl import JsonlWriter
from ludic.task.environment import Environment
from ludic.task.pretrained import serving_files
from ludic.task.prompts import load_tokenizer
from ludic.train.checkpoint import (
    CheckpointError,
    TrainerState,
    read_prompts,
    save_checkpoint,
    training_folder,
)
from ludic.train.inputs import check_task, prompt_token_ids
from ludic.train.learner import Learner
from ludic.train.learner_thread import LearnerThread, to_its_end
from ludic.train.memory import fit_budget
from ludic.train.metrics import JsonlLogger, MetricLogger
from ludic.train.nonfinite import check_skipped, skipped_in_a_row, what_was_skipped
from ludic.train.prompt_source import PromptSource
from ludic.train.schedule import check_same_data_order, evaluation_is_due, schedule_factor
from ludic.train.summary import TrainingSummary, summarise
from ludic.train.token_records import TokenGaps, training_fields
from ludic.train.update_batch import UpdateBatch
from ludic.types import SamplingParams, TrainingSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
SampleT = TypeVar("SampleT")


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
        reference_model: frozen, on the same device; needed if `config.kl_coef` is above 0 and all weights are trained.
        resume_from: a checkpoint of this run, whose model was already loaded into `model`; of an adapter, its base was.
        learner: of this `model` and `config`, where several processes share the work (see `sharded`); by default one is made.
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
        learner: Learner | None = None,
        task: Mapping[str, Any] | None = None,
        wandb_run_id: str | None = None,
    ) -> None:
        if not train_samples:
            raise ValueError("there are no samples to train on")
        check_task(task or {}, config)
        model_name = model_name or model.name_or_path
        if not model_name:
            raise ValueError(
                "this model was made in code and has no name: give model_name, the folder or hub name of its files"
            )
        tokenizer = load_tokenizer(model_name) if tokenizer is None else tokenizer
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.engine, self.environment = engine, environment
        self.train_samples, self.eval_samples = train_samples, eval_samples
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
        token_ids = prompt_token_ids(config, train_samples, train_prompts, environment, tokenizer)
        self._settings = {**dataclasses.asdict(config), "num_train_samples": len(train_samples)}
        self.learner = learner or Learner(
            config, model, reference_model=reference_model, checkpoint=resume_from[0] if resume_from else None
        )
        state = TrainerState(step=0, policy_version=0, model=model_name, config=self._settings)
        self.last_checkpoint: Path | None = None
        if resume_from is not None:
            self.last_checkpoint, state = resume_from
            self._take_up(self.last_checkpoint, state)
        known = read_prompts(self.last_checkpoint) if self.last_checkpoint else None
        self.prompts = PromptSource(config, train_samples, token_ids, step=state.step, state=known)
        self.state = self._saved = dataclasses.replace(
            state, config=self._settings, task=dict(task or {}), wandb_run_id=wandb_run_id or state.wandb_run_id
        )
        self._closes_logger = metric_logger is None
        self.metric_logger = JsonlLogger(self.paths.metrics) if metric_logger is None else metric_logger

    def _take_up(self, checkpoint: Path, state: TrainerState) -> None:
        """Go on from a checkpoint whose model is loaded already."""
        check_same_data_order(state, self._settings)
        self.learner.resume(training_folder(checkpoint))

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
            contextlib.closing(self.metric_logger) if self._closes_logger else contextlib.nullcontext(),
            JsonlWriter(self.paths.rollouts) as self._writer,
            TokenGaps(self.paths.token_gaps if self.config.record_token_logprobs else None) as self._token_gaps,
        ):
            async with LearnerThread(self.learner, self.state.policy_version) as self._policy:
                self._rollouts = GroupStream(
                    self.engine,
                    self.environment,
                    group_size=self.config.group_size,
                    tokenizer=self.tokenizer,
                    record=self._writer.write,
                    further_fields=functools.partial(training_fields, config=self.config, tokenizer=self.tokenizer),
                    fields_take_long=self.config.record_token_logprobs,
                    shape_reward=overlong_shaping(self.config.overlong_buffer),
                    replacement=self.prompts.replacement if self.config.dynamic_sampling else None,
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
            self._rollouts.submit(ahead, self.prompts.take(ahead))

    async def _collect(self) -> UpdateBatch:
        """Wait for the groups of the next update, and accumulate the gradient of those that are there meanwhile."""
        self.learner.discard()  # what an update that failed may have left
        config, version = self.config, self.state.policy_version
        batch, pending = UpdateBatch(), list[TrainingSample]()
        enough = self.learner.enough_tokens
        waiting_since = time.perf_counter()
        async for groups in self._rollouts.groups(self.state.step + 1):
            batch.wait_s += time.perf_counter() - waiting_since
            batch.groups += groups
            if self.engine.overlaps_training:
                pending += [sample for group in groups for sample in batch.take(group, config, version)]
                if sum(len(sample.token_ids) for sample in pending) >= enough:
                    await self._accumulate(batch, pending)
                    pending = []
            waiting_since = time.perf_counter()
        batch.wait_s += time.perf_counter() - waiting_since
        batch.groups.sort(key=lambda group: group.group_id)
        if not self.engine.overlaps_training:
            pending = [sample for group in batch.groups for sample in batch.take(group, config, version)]
        await self._accumulate(batch, pending)
        batch.replaced = self._rollouts.replaced(self.state.step + 1)
        batch.times = self._rollouts.timings(self.state.step + 1)
        return batch

    async def _accumulate(self, batch: UpdateBatch, samples: Sequence[TrainingSample]) -> None:
        if samples:
            started = time.perf_counter()
            await self._policy.call(self.learner.accumulate, samples, self._token_gaps.watch)
            batch.train_s += time.perf_counter() - started

    async def _step(self, batch: UpdateBatch) -> None:
        """Step the optimizer and count the update, whole or not at all."""
        generated = batch.groups + batch.replaced
        metrics = rollout_metrics(generated, policy_version=self.state.policy_version) | batch.counts()
        metrics["learning_rate"] = self.config.learning_rate * schedule_factor(self.config, self.state.step)
        if metrics["trained_sequences"]:
            started = time.perf_counter()
            try:
                figures = await self._policy.step(
                    learning_rate=metrics["learning_rate"],
                    num_without_loss=sum(stats.num_without_loss for stats in batch.stats),
                    advantage_scale=batch.advantage_scale(self.config),
                )
            except (FloatingPointError, MemoryError) as error:
                raise type(error)(f"update {self.state.step + 1}: {error}") from error
            metrics |= figures
            if (kl := figures.get("kl_ref", figures.get("kl_rollout"))) is not None:
                metrics["kl"] = kl  # to the reference policy, else to the sampler
            batch.train_s += time.perf_counter() - started
        else:
            reasons = batch.why_nothing_was_learned(self.config)
            logger.warning("update %d: nothing to learn from: %s", self.state.step + 1, reasons)
            await self._policy.skip_step()
        metrics |= self.prompts.count(self.state.step + 1, generated)
        rollouts = [rollout for group in generated for rollout in group.rollouts]
        self.state = dataclasses.replace(
            self.state,
            skipped_updates=self.state.skipped_updates + int(metrics.get("skipped_update", 0)),
            skipped_in_a_row=skipped_in_a_row(self.state.skipped_in_a_row, metrics),
            step=self.state.step + 1,
            policy_version=self.state.policy_version + 1,
            rollouts=self.state.rollouts + len(rollouts),
            completion_tokens=self.state.completion_tokens + sum(r.completion.num_sampled_tokens for r in rollouts),
            seconds=self._seconds_before + time.perf_counter() - self._started,
        )
        batch.metrics = metrics

    # -- weights, evaluation, checkpoints, log ---------------------------------------------------------------------

    async def _sync(self) -> WeightSyncReport:
        report = await self.engine.update_weights(self._policy)
        logger.info("weight sync %d: %.3f s, %s", report.policy_version, report.seconds, report.proof)
        return report

    async def _evaluate_if_due(self) -> None:
        if self.eval_samples and evaluation_is_due(self.config, self.state, self._eval_settings):
            await self._evaluate()

    async def _evaluate(self) -> None:
        config = self.config
        sampling = SamplingParams(
            temperature=config.eval_temperature,
            max_tokens=self._eval_settings["max_tokens"],
            seed=derive_seed(config.seed, self.state.step),
        )
        result: EvaluationResult = await evaluate(
            self.engine,
            self.environment,
            self.eval_samples[: config.eval_limit],
            tokenizer=self.tokenizer,
            sampling=sampling,
            concurrency=self._eval_concurrency,
            max_seq_len=config.max_seq_len,
        )
        summary = result.to_summary(model=self.state.model, settings=self._eval_settings)
        self.state = dataclasses.replace(
            self.state, evaluations=[*self.state.evaluations, {"step": self.state.step, **summary}]
        )
        logged = [name for name in summary if name.endswith("accuracy") or name in _EVAL_METRICS]
        self.metric_logger.log(self.state.step, {f"eval/{name}": float(str(summary[name])) for name in logged})

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
        self.last_checkpoint = await self._policy.call(self._write_checkpoint)
        self._saved = self.state
        return self.last_checkpoint

    def _write_checkpoint(self) -> "Path":
        weights, optimizer = self.learner.full_state()
        return save_checkpoint(
            self.paths.checkpoints,
            model=self.model,
            weights=weights,
            tokenizer=self.tokenizer,
            optimizer=optimizer,
            state=self.state,
            prompts=self.prompts.state(),
            model_dtype=self._model_dtype,
            source_files=self._source_files,
            keep=self.config.keep_checkpoints,
            adapter=self.learner.adapter,
        )

    @contextlib.asynccontextmanager
    async def _logged(self, batch: UpdateBatch) -> AsyncIterator[None]:
        """An update that was counted is logged, with the gaps of its tokens, whatever becomes of its sync."""
        try:
            yield
        finally:
            if batch.metrics:
                figures = batch.figures() | {"policy_version": self.state.policy_version} | self.engine.counts()
                self.metric_logger.log(self.state.step, figures)
                await to_its_end(self._policy.call(self._token_gaps.write, self.state.step))
        await asyncio.to_thread(self._writer.flush)
        if skipped := what_was_skipped(batch.metrics):
            diagnosis = self.learner.diagnosis()
            self.metric_logger.event(self.state.step, f"update {self.state.step} {skipped}: {diagnosis}")
            check_skipped(self.state.step, in_a_row=self.state.skipped_in_a_row, diagnosis=diagnosis)


_EVAL_METRICS = (
    "correct_rate",
    "parse_err_rate",
    "truncation_rate",
    "avg_completion_length",
    "num_problems",
    "seconds",
)

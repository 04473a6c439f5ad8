"""GRPO with verifiable rewards: generation in a vLLM server, training beside it.

The names below are the public ones; each lives in the module that its import names, and is loaded when it is first
used. `import ludic` alone therefore loads neither PyTorch nor transformers. What is not listed here may change.

    from ludic import GRPOConfig, GRPOTrainer, LocalEngine, Score

`GRPOTrainer` is the whole loop; `training_samples`, `pack` and `Learner` are the pieces of a loop of one's own. docs/api.md
has a complete program with a task of its own.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ludic.config import GRPOConfig, RunPaths
    from ludic.inference.client.server_process import ServerProcess, start_server
    from ludic.inference.client.vllm_client import VLLMEngine
    from ludic.rollout.engine import InferenceEngine, Policy, PolicyWeights, WeightSyncReport
    from ludic.rollout.errors import EngineError
    from ludic.rollout.evaluation import EvaluationResult, evaluate
    from ludic.rollout.local import LocalEngine
    from ludic.survival.recovery import RecoveringEngine
    from ludic.task.environment import Environment
    from ludic.task.grading import Grader, Verdict, answers_match
    from ludic.task.parsers import boxed_parser, last_number_parser
    from ludic.task.prompts import load_tokenizer
    from ludic.telemetry.loggers import make_logger
    from ludic.train.advantages import training_samples
    from ludic.train.learner import Learner
    from ludic.train.metrics import MetricLogger
    from ludic.train.packing import pack
    from ludic.train.summary import TrainingSummary
    from ludic.train.trainer import GRPOTrainer
    from ludic.train.warm_start import warm_start
    from ludic.types import (
        ChatMessage,
        Completion,
        ParseResult,
        Rollout,
        RolloutGroup,
        SamplingParams,
        Score,
        TrainingSample,
    )

__all__ = [
    "ChatMessage",
    "Completion",
    "EngineError",
    "Environment",
    "EvaluationResult",
    "GRPOConfig",
    "GRPOTrainer",
    "Grader",
    "InferenceEngine",
    "Learner",
    "LocalEngine",
    "MetricLogger",
    "ParseResult",
    "Policy",
    "PolicyWeights",
    "RecoveringEngine",
    "Rollout",
    "RolloutGroup",
    "RunPaths",
    "SamplingParams",
    "Score",
    "ServerProcess",
    "TrainingSample",
    "TrainingSummary",
    "VLLMEngine",
    "Verdict",
    "WeightSyncReport",
    "answers_match",
    "boxed_parser",
    "evaluate",
    "last_number_parser",
    "load_tokenizer",
    "make_logger",
    "pack",
    "start_server",
    "training_samples",
    "warm_start",
]

_HOMES = {
    "ChatMessage": "types",
    "Completion": "types",
    "EngineError": "rollout.errors",
    "Environment": "task.environment",
    "EvaluationResult": "rollout.evaluation",
    "GRPOConfig": "config",
    "GRPOTrainer": "train.trainer",
    "Grader": "task.grading",
    "InferenceEngine": "rollout.engine",
    "Learner": "train.learner",
    "LocalEngine": "rollout.local",
    "MetricLogger": "train.metrics",
    "ParseResult": "types",
    "Policy": "rollout.engine",
    "PolicyWeights": "rollout.engine",
    "RecoveringEngine": "survival.recovery",
    "Rollout": "types",
    "RolloutGroup": "types",
    "RunPaths": "config",
    "SamplingParams": "types",
    "Score": "types",
    "ServerProcess": "inference.client.server_process",
    "TrainingSample": "types",
    "TrainingSummary": "train.summary",
    "VLLMEngine": "inference.client.vllm_client",
    "Verdict": "task.grading",
    "WeightSyncReport": "rollout.engine",
    "answers_match": "task.grading",
    "boxed_parser": "task.parsers",
    "evaluate": "rollout.evaluation",
    "last_number_parser": "task.parsers",
    "load_tokenizer": "task.prompts",
    "make_logger": "telemetry.loggers",
    "pack": "train.packing",
    "start_server": "inference.client.server_process",
    "training_samples": "train.advantages",
    "warm_start": "train.warm_start",
}
"""The module below `ludic` that defines each public name."""


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> object:
        """Load a public name from its module, once (PEP 562)."""
        if name not in _HOMES:
            raise AttributeError(f"module 'ludic' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"ludic.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What a run says about itself: metrics to the terminal, to JSON lines and to W&B, and the report at its end."""

from ludic.storage.jsonl import JsonlFile, JsonlWriter, drop_steps_after, encode_line, read_jsonl
from ludic.telemetry.formatting import format_evaluation, format_metric, format_step_line
from ludic.telemetry.loggers import LOGGER_NAMES, MultiLogger, make_logger, parse_logger_names
from ludic.telemetry.progress import EvaluationDisplay
from ludic.telemetry.report import (
    ComparisonRow,
    comparison_table,
    evaluation_rows,
    evaluation_table,
    rate_with_interval,
    reward_curve_text,
    save_reward_curve,
)
from ludic.train.metrics import MetricLogger

__all__ = [
    "LOGGER_NAMES",
    "ComparisonRow",
    "EvaluationDisplay",
    "JsonlFile",
    "JsonlWriter",
    "MetricLogger",
    "MultiLogger",
    "comparison_table",
    "drop_steps_after",
    "encode_line",
    "evaluation_rows",
    "evaluation_table",
    "format_evaluation",
    "format_metric",
    "format_step_line",
    "make_logger",
    "parse_logger_names",
    "rate_with_interval",
    "read_jsonl",
    "reward_curve_text",
    "save_reward_curve",
]

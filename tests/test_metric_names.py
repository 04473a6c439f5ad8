"""The table of metrics has every metric that is logged, each with a unit, a meaning and a healthy range, and no other."""

import ast
import re
from pathlib import Path

from environments.gsm8k import GSM8K
from ludic.inference.weights.sync_probe import PROBE_GAP_LIMIT
from ludic.telemetry.alarms import ALARM_NAMES
from ludic.telemetry.metric_names import METRICS
from tests.test_trainer import Run

SOURCE = Path(__file__).parents[1] / "src/ludic"
TABLE = {metric.name: metric for metrics in METRICS.values() for metric in metrics}


def strings_of_the_code() -> set[str]:
    """The string constants of all code that makes metrics."""
    paths = [path for room in ("rollout", "train", "inference", "survival") for path in (SOURCE / room).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_metric_stands_once_and_has_a_unit_a_meaning_and_a_healthy_range() -> None:
    assert len(TABLE) == sum(map(len, METRICS.values())) > 60
    assert [metric for metric in TABLE.values() if not all(metric) or any("|" in cell for cell in metric)] == []


def test_every_metric_of_the_table_is_made_by_some_code() -> None:
    strings, rules = strings_of_the_code(), {f"eval/{rule}_accuracy" for rule in GSM8K.rules}
    made = {name for name in TABLE if name in strings or name.removeprefix("eval/") in strings}
    assert "sync/" in strings and TABLE.keys() - made - rules == {"sync/PHASE_s"}


def test_everything_that_a_run_with_every_correction_logs_is_in_the_table(
    digit_policy_dir: Path, tmp_path: Path
) -> None:
    run = Run(
        digit_policy_dir, tmp_path, kl_coef=0.1, epochs_per_update=2, tis_cap=2.0, with_reference=True, eval_every=1
    )
    run.go()
    logged = {re.sub(r"^sync/\w+_s$", "sync/PHASE_s", name) for row in run.logger.rows for name in row} - {"step"}
    assert {"kl_ref", "skipped_steps", "tis_weight_mean", "num_gap_tokens", "eval/accuracy"} <= logged
    assert logged <= TABLE.keys()
    masked = Run(
        digit_policy_dir, tmp_path / "masked", importance_mask="token", dual_clip=3.0, overlong_buffer=4, mini_batches=2
    )
    masked.go()
    logged = {re.sub(r"^sync/\w+_s$", "sync/PHASE_s", name) for row in masked.logger.rows for name in row} - {"step"}
    assert {"importance_masked_fraction", "overlong_reward", "optimizer_steps", "kl_old_negative"} <= logged
    assert logged <= TABLE.keys()


def test_a_figure_within_its_bounds_is_logged_as_the_table_says(digit_policy_dir: Path, tmp_path: Path) -> None:
    run = Run(digit_policy_dir, tmp_path)
    run.go()
    seen = [(name, value) for row in run.logger.rows for name, value in row.items() if name in TABLE]
    fractions = [value for name, value in seen if TABLE[name].unit in ("fraction", "0 or 1")]
    assert len(fractions) > 10 and all(0 <= value <= 1 for value in fractions)
    assert all(value == 0 for name, value in seen if TABLE[name].healthy == "0")


def test_an_alarm_and_a_metric_that_a_healthy_range_names_exist_and_each_alarm_is_named() -> None:
    healthy = " ".join(metric.healthy for metric in TABLE.values())
    assert set(re.findall(r"alarm `(\w+)`", healthy)) == set(ALARM_NAMES)
    assert f"at most {PROBE_GAP_LIMIT:g}:" in TABLE["sync/logprob_gap"].healthy
    named = {name for metric in TABLE.values() for name in re.findall(r"(?<!alarm )`([a-z]\w+)`", metric.healthy)}
    assert len(named) > 4 and named <= TABLE.keys()

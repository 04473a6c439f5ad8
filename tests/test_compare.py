"""Two evaluations or two sets of runs compared: figures by hand and by simulation, and the command as a user types it."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from ludic.compare.__main__ import main
from ludic.compare.evaluations import compare_evaluations
from ludic.compare.paired import compare, difference_interval, mcnemar_exact, more_problems
from ludic.compare.runs import compare_runs, read_run

Verdicts = Sequence[Sequence[bool]]


def pairs(both: int, won: int, lost: int, neither: int) -> tuple[Verdicts, Verdicts]:
    """A's and B's verdicts, one completion a problem."""
    a = [True] * both + [False] * won + [True] * lost + [False] * neither
    b = [True] * both + [True] * won + [False] * lost + [False] * neither
    return [[one] for one in a], [[one] for one in b]


def write_records(path: Path, rules: dict[str, list[list[bool]]], *, first: int = 0) -> Path:
    """An evaluation's records: for each rule, the verdicts of each problem's completions."""
    lines = []
    for place, verdicts in enumerate(zip(*rules.values(), strict=True)):
        completions = [
            {"text": "7", "num_tokens": 1, "finish_reason": "stop", "answer": "7", "parse_error": None, "correct": True}
            | {"grader_failed": False, "policy_version": 0}
            | {rule: of_problem[member] for rule, of_problem in zip(rules, verdicts, strict=True)}
            for member in range(len(verdicts[0]))
        ]
        lines.append(
            {
                "index": place,
                "question_id": f"question {first + place}",
                "prompt": [],
                "prompt_tokens": 3,
                "target": "7",
            }
            | {"completions": completions}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_run(folder: Path, accuracies: dict[int, float], *, problems: str = "p") -> Path:
    """A training run of 10 rollouts and 2 seconds an update, evaluated at these steps."""
    folder.mkdir(parents=True)
    last = max(accuracies)
    evaluations = [
        {"step": step, "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.05, accuracy + 0.04]}
        | {"settings": {"problems": problems}}
        for step, accuracy in accuracies.items()
    ]
    summary = {"updates": last, "rollouts": 10 * last, "evaluations": evaluations}
    (folder / "task_train_summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "step_s": 2.0} for step in range(1, last + 1)]
    (folder / "task_train_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


# --- the statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("won", "lost", "p_value"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 0, 1.0), (9, 1, 22 / 1024), (0, 10, 2 / 1024), (6, 2, 2 * (1 + 8 + 28) / 256)],
)
def test_mcnemars_exact_p_is_twice_the_tail_of_a_fair_coin(won: int, lost: int, p_value: float) -> None:
    assert mcnemar_exact(won, lost) == pytest.approx(p_value)


def test_won_lost_tied_and_the_difference_are_counted_by_problem() -> None:
    result = compare(*pairs(both=40, won=9, lost=1, neither=50))
    assert (result.won, result.lost, result.tied) == (9, 1, 90)
    assert (result.accuracy_a, result.accuracy_b) == pytest.approx((0.41, 0.49))
    assert result.difference == pytest.approx(0.08)
    assert result.num_more_problems == 0 and result.p_value < 0.05


def test_the_interval_of_the_difference_is_bonett_and_prices() -> None:
    # n = 100, 9 won, 1 lost: (10 - 2) / 102 and its standard error sqrt((10 + 2 - 8^2 / 102) / 102^2), by hand.
    differences = [1.0] * 9 + [-1.0] + [0.0] * 90
    centre, error = 8 / 102, (12 / 102 - (8 / 102) ** 2) ** 0.5 / 102**0.5
    assert difference_interval(differences) == pytest.approx((centre - 1.959964 * error, centre + 1.959964 * error))


def test_the_interval_keeps_a_width_where_all_are_tied() -> None:
    low, high = difference_interval([0.0] * 50)
    assert low < -0.02 and high > 0.02 and low == pytest.approx(-high)


@pytest.mark.parametrize("num_completions", [1, 4])
def test_the_interval_holds_the_true_difference_about_95_times_in_100(num_completions: int) -> None:
    random_ = random.Random(0)
    inside = 0
    for _ in range(400):
        a, b = [], []
        for _ in range(150):
            difficulty = random_.random()  # problems differ, which is what pairing is for
            a.append([random_.random() < 0.8 * difficulty for _ in range(num_completions)])
            b.append([random_.random() < 0.8 * difficulty + 0.1 for _ in range(num_completions)])
        low, high = compare(a, b).difference_ci95
        inside += low <= 0.1 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_the_p_value_is_small_by_chance_alone_no_more_often_than_it_says() -> None:
    random_ = random.Random(1)
    small = 0
    for _ in range(400):
        right = [(random_.random(), random_.random()) for _ in range(100)]
        small += compare([[a < 0.5] for a, _ in right], [[b < 0.5] for _, b in right]).p_value < 0.05
    assert small / 400 <= 0.06


def test_as_many_more_problems_as_are_named_find_the_difference_four_times_in_five() -> None:
    a, b = pairs(both=30, won=6, lost=2, neither=62)
    few = compare(a, b)
    assert few.p_value > 0.05 and few.num_more_problems is not None and few.num_more_problems > 50
    random_, found = random.Random(2), 0
    places = range(len(a))
    for _ in range(300):
        drawn = random_.choices(places, k=len(a) + few.num_more_problems)
        found += compare([a[one] for one in drawn], [b[one] for one in drawn]).p_value < 0.05
    assert 0.7 <= found / 300 <= 0.9


def test_no_number_of_problems_tells_apart_what_does_not_differ() -> None:
    assert more_problems([1.0, -1.0, 0.0]) is None


# --- two evaluations --------------------------------------------------------------------------------------------------


def test_records_are_paired_by_question_and_not_by_place(tmp_path: Path) -> None:
    a = write_records(tmp_path / "a.jsonl", {"right": [[True], [False], [True]]})
    b = write_records(tmp_path / "b.jsonl", {"right": [[True], [True], [False]]}, first=1)  # questions 1, 2, 3
    result = compare_evaluations(a, b)
    assert (result.headline.won, result.headline.lost, result.headline.tied) == (1, 0, 1)
    assert (result.num_only_in_a, result.num_only_in_b) == (1, 1)


def test_a_question_that_is_there_twice_counts_twice(tmp_path: Path) -> None:
    a = write_records(tmp_path / "a.jsonl", {"right": [[True], [True]]})
    a.write_text(a.read_text().replace("question 1", "question 0"))
    assert compare_evaluations(a, a).headline.num_problems == 2


def test_a_gain_is_split_into_format_and_reasoning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {"flexible": [[True]] * 40 + [[False]] * 60, "strict": [[True]] * 20 + [[False]] * 80}
    after = {"flexible": [[True]] * 45 + [[False]] * 55, "strict": [[True]] * 43 + [[False]] * 57}
    a, b = write_records(tmp_path / "a.jsonl", before), write_records(tmp_path / "b.jsonl", after)
    assert compare_evaluations(a, b).format_gain == pytest.approx(0.18)
    assert main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "By the rule flexible, on 100 problems: not yet distinguishable: about" in said
    assert "Of the strict rule's +23.0 points, +18.0 points are format" in said
    assert main([str(a), str(b), "--rule", "strict"]) == 0
    assert "By the rule strict, on 100 problems: B is better by 23.0 points (p < 0.0001)." in capsys.readouterr().out


def test_where_the_strict_and_the_flexible_rule_agree_nothing_is_said_of_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (
        {rule: verdicts for rule in ("flexible", "strict")} for verdicts in ([[False]] * 20, [[True]] * 20)
    )
    assert main([str(write_records(tmp_path / f"{name}.jsonl", of)) for name, of in (("a", before), ("b", after))]) == 0
    said = capsys.readouterr().out
    assert "B is better by 100.0 points" in said and "format" not in said


def test_evaluations_with_other_sampling_are_compared_with_a_warning_before_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_records(tmp_path / f"{name}.jsonl", {"right": [[True], [False]]}) for name in "ab")
    same = {"model": "m", "top_p": 1.0, "max_tokens": 40}
    Path(f"{a}.settings.json").write_text(json.dumps(same | {"samples": 4, "temperature": 1.0}))
    Path(f"{b}.settings.json").write_text(json.dumps(same | {"samples": 1, "temperature": 0.0, "model": "other"}))
    assert main([str(a), str(b)]) == 0
    warning, verdict = capsys.readouterr().out.splitlines()[-2:]
    assert warning == (
        "warning: the evaluations differ in samples (4, 1), temperature (1.0, 0.0): "
        "the difference may come from that and not from the model"
    )
    assert verdict.startswith("By the rule right")
    assert main([str(a), str(a)]) == 0
    assert "warning" not in capsys.readouterr().out


def test_records_of_before_the_environment_named_its_rules_have_the_flexible_one_first(tmp_path: Path) -> None:
    old = write_records(tmp_path / "old.jsonl", {"strict": [[True]], "flexible": [[True]], "qwen": [[False]]})
    assert list(compare_evaluations(old, old).by_rule) == ["flexible", "strict", "qwen"]


def test_a_rule_that_one_record_lacks_is_left_out_and_without_a_common_one_nothing_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = write_records(tmp_path / "both.jsonl", {"flexible": [[True], [True]], "strict": [[True], [True]]})
    one = write_records(tmp_path / "one.jsonl", {"flexible": [[True], [True]]})
    other = write_records(tmp_path / "other.jsonl", {"exact": [[True], [True]]})
    assert list(compare_evaluations(both, one).by_rule) == ["flexible"]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(both.read_text().splitlines()[0] + "\n" + one.read_text().splitlines()[1] + "\n")
    assert list(compare_evaluations(both, mixed).by_rule) == ["flexible"]
    assert main([str(both), str(other)]) == 2
    assert "no rule in common" in capsys.readouterr().err


def test_json_has_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_records(tmp_path / "a.jsonl", {"right": [[False, True]] * 8})
    b = write_records(tmp_path / "b.jsonl", {"right": [[True, True]] * 8})
    assert main([str(a), str(b), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["by_rule"]["right"]
    assert (figures["won"], figures["difference"], figures["p_value"]) == (8, 0.5, 2 / 256)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "no question in common"),
        ('{"step": 1}\n', r"b\.jsonl:1: not an evaluation record"),
        (None, "name one records file"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    lines: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_records(tmp_path / "a.jsonl", {"right": [[True]]}), tmp_path / "b.jsonl"
    if lines is not None:
        b.write_text(lines)
    assert main([str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error)


def test_a_rule_that_is_not_there_is_refused_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_records(tmp_path / "a.jsonl", {"flexible": [[True]], "strict": [[True]]})
    assert main([str(a), str(a), "--rule", "lenient"]) == 2
    assert "both evaluations have the rules flexible, strict" in capsys.readouterr().err


def test_the_name_of_a_rule_does_not_act_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_records(tmp_path / "a.jsonl", {"[red]\x1b[2J": [[True]]})
    assert main([str(a), str(a)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "[red]" in said


# --- training runs ----------------------------------------------------------------------------------------------------


def test_seeds_are_compared_by_welchs_test(tmp_path: Path) -> None:
    a = [read_run(write_run(tmp_path / f"a{n}", {0: 0.2, 10: final})) for n, final in enumerate((0.50, 0.52, 0.54))]
    b = [read_run(write_run(tmp_path / f"b{n}", {0: 0.2, 10: final})) for n, final in enumerate((0.60, 0.62, 0.64))]
    result = compare_runs(a, b)
    # Means 0.1 apart, variances 0.0004: t = 0.1 / sqrt(0.0008 / 3) = 6.124 at 4 degrees of freedom; 2.776 is t's quantile.
    assert result.p_value == pytest.approx(0.0036, abs=1e-4) and result.num_more_seeds == 0
    half = 2.776 * (0.0008 / 3) ** 0.5
    assert result.difference_ci95 == pytest.approx((0.1 - half, 0.1 + half), abs=1e-4)


def test_seconds_and_rollouts_to_an_accuracy_are_those_of_the_first_evaluation_that_has_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = write_run(tmp_path / "slow", {0: 0.2, 5: 0.4, 10: 0.61, 15: 0.6})
    fast = write_run(tmp_path / "fast", {0: 0.2, 5: 0.6, 10: 0.7, 15: 0.75})
    assert main([str(slow), str(fast), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == pytest.approx(0.6) and result["p_value"] is None
    assert (result["reached"]["a"][0]["seconds"], result["reached"]["a"][0]["rollouts"]) == (20.0, 100)
    assert (result["reached"]["b"][0]["seconds"], result["reached"]["b"][0]["rollouts"]) == (10.0, 50)
    assert main([str(slow), str(fast), "--accuracy", "0.7"]) == 0
    said = capsys.readouterr().out
    assert "not reached" in said and "Train more seeds" in said


def test_seeds_that_do_not_tell_yet_say_how_many_more_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = [str(write_run(tmp_path / f"a{n}", {10: final})) for n, final in enumerate((0.50, 0.56, 0.53))]
    b = [str(write_run(tmp_path / f"b{n}", {10: final})) for n, final in enumerate((0.53, 0.60, 0.55))]
    assert main([",".join(a), ",".join(b)]) == 0
    assert re.search(r"Not yet distinguishable: about \d+ more seeds of each would tell\.", capsys.readouterr().out)


def test_runs_that_were_evaluated_differently_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run(tmp_path / "a", {5: 0.5}), write_run(tmp_path / "b", {5: 0.6}, problems="other")
    assert main([str(a), str(b)]) == 2
    assert "evaluated differently" in capsys.readouterr().err

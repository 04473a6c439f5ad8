from itertools import islice
from pathlib import Path

from benchmarks.faults.grader import inject
from benchmarks.faults.grader_corpus import ordinary, poison


def test_poison_of_each_kind_harms_no_ordinary_answer(tmp_path: Path) -> None:
    kinds = len({kind for kind, _ in islice(poison(1_000, seed=0), 1_000)})
    *hostile, plain, _alone, _together = inject(kinds, seed=1, folder=tmp_path, num_ordinary=100, timeout_s=0.5)
    assert len({injection.fault for injection in hostile}) == kinds > 70
    assert [injection for injection in hostile if not injection.ok] == []
    assert plain.ok, plain.outcome
    assert {"too long", "too complex", "timeout", "wrong"} <= {injection.outcome for injection in hostile}


def test_the_same_seed_makes_the_same_answers_and_another_one_others() -> None:
    assert list(poison(500, seed=3)) == list(poison(500, seed=3)) != list(poison(500, seed=4))
    assert ordinary(50, seed=3) == ordinary(50, seed=3) != ordinary(50, seed=4)

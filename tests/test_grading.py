import asyncio
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.faults.grader_corpus import competition
from ludic.task.answer_cost import cost
from ludic.task.grading import MATCH_LIMIT_S, Grader, Verdict, _default_grader, answers_match
from ludic.task.numbers import MAX_ANSWER_CHARS, clean_answer, read_number
from tests.fuzz.fuzz_grader import check_pair
from tests.fuzz.fuzz_parsers import decode

HANGS = r"\int_0^{188} \frac{x^{188} \sin(x^3) e^{x^2}}{\sqrt{x^5 + 188}} dx"
RIGHT = Verdict(matched=True)
WRONG = Verdict(matched=False)


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    """One for all tests of this file, each of which has an event loop of its own."""
    made = Grader(num_workers=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[Grader]:
    """One whose deadline is a fraction of what importing math-verify takes."""
    made = Grader(num_workers=2, timeout_s=0.3)
    yield made
    made.close()


@pytest.fixture
def no_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("ludic.task.grading_pool._Process.__init__", refuse)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


def keeper(grader: Grader) -> int:
    """The process id of what starts the grader's workers."""
    process = grader._pool._process
    assert process is not None
    return process.popen.pid


def forks(pid: int) -> list[int]:
    """The children of a process: for a grader's, its workers."""
    lines = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in lines.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def ended(pids: list[int]) -> bool:
    deadline = time.monotonic() + 30.0
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(is_alive, pids))


@pytest.mark.usefixtures("no_math_verify")
@pytest.mark.parametrize(
    "prediction",
    ["18", "18.0", "18.00", "+18", "18.", "18,", "018", "$18", r"\$18", r"$\$18$", "$18$", "$$18$$", r"\(18\)",
     r"\[18\]", "{18}", "{{18}}", r"\boxed{18}", r"\text{18}", r"\mathbf{18}", "**18**", "$18.00", "18 €", "USD 18",
     "18 dollars", r"18 \text{ dollars}", r"18\text{ dollars per day}.", "18 apples", "18 km/h", r"18\text{ cm}^2",
     r"18^\circ", "18°", "18 dozen", "36/2", r"\frac{36}{2}", r"\dfrac{36}{2}", r"-\frac{-36}{2}", r"\frac{3.6}{0.2}",
     "17 2/2", r"17\frac{2}{2}", "1.8e1", r"1.8 \times 10^{1}", "0.18 hundred", "1800%", "x=18", "x = 18", "Total: 18",
     r"x_1 = \$18"],
)  # fmt: skip
def test_eighteen_in_any_plain_dress_is_right_without_math_verify(grader: Grader, prediction: str) -> None:
    assert grader.match_sync(prediction, "18") == RIGHT
    assert grader.match_sync("18", prediction) == RIGHT


@pytest.mark.usefixtures("no_math_verify")
@pytest.mark.parametrize(
    "prediction",
    ["", " ", "?", "eighteen", "17", "-18", "81", "1.8", "18.0000000000000000001", "0.18%", r"1.8\%",
     "180 percent", "18 thousand", "18e1", "17 18", "18 18", "9 9", "17, 18", "1,8", "1,00", "x > 18", r"x \neq 18",
     "I think 18", "The answer is 18", "18 minutes and 30 seconds", "17 = 18", "18 = 17", "x = 17 = 18", "x = 1,8",
     "1" * 1_999, "1e999999999", "5} and {18", "18 {", "one = two"],
)  # fmt: skip
def test_what_is_plainly_not_eighteen_is_wrong_without_math_verify(grader: Grader, prediction: str) -> None:
    assert grader.match_sync(prediction, "18") == WRONG


@pytest.mark.usefixtures("no_math_verify")
@pytest.mark.parametrize(
    ("prediction", "target", "matched"),
    [
        ("1,000", "1000", True),
        ("1000", "1,000", True),
        ("1{,}000", "1000", True),
        (r"1\,000", "1000", True),
        ("1 000 000", "1,000,000", True),
        ("1.5 million", "1,500,000", True),
        ("1,00", "100", False),
        ("1,00", "1", False),
        ("1,0000", "10000", False),
        ("0,123", "123", False),
        (".5", "1/2", True),
        (r"\frac12", "0.5", True),
        ("0.333", "1/3", False),
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("-$5", "-5", True),
        ("0.18", "18%", True),
        (r"18\%", "18 percent", True),
        ("-0", "0", True),
        ("0e999999999", "0", True),
        ("1e999999999", "1e999999999", True),
        ("1e999999999", "1e999999998", False),
        ("x = 18 = 18.0", "18", True),
        ("18 cents", "18 dollars", False),
        ("18 dollar", "18 Dollars", True),
        ("y = 18", "x = 18", False),
        ("Paris", "Paris", True),
        (r"\text{Paris}.", "Paris", True),
        ("1/0", "1/0", True),
    ],
)
def test_numbers_are_compared_exactly(grader: Grader, prediction: str, target: str, matched: bool) -> None:
    assert grader.match_sync(prediction, target) == Verdict(matched=matched)


@pytest.mark.parametrize(
    ("prediction", "target", "matched"),
    [
        ("(18)", "18", True),
        ("9*2", "18", True),
        ("9*2 dollars", "18", True),
        ("9*2 dollars", "18 cents", False),
        (r"9 \times 2 \text{ km}", "18 m", False),
        (r"(9*2)\%", "18", True),
        ("9*2", r"18\%", True),
        (r"3\sqrt{2}\text{ km}", r"3\sqrt{2}\text{ km}", True),
        (r"3\sqrt{2}\text{ km}", r"3\sqrt{2}", True),
        (r"3\sqrt{2}\text{ km}", r"\sqrt{18}\text{ m}", False),
        (r"36\pi\text{ cm}^2", r"(6)^2\pi", True),
        (r"\frac{x}{2}\%", r"0.5x", True),
        (r"\sqrt{4}\text{ thirds}", "2", False),
        ("18th", "18", False),
        ("5t", "5", False),
        ("3d", "3", False),
        (r"9 \times 2 = 18", "18", True),
        (r"9 \times 2 = 19", "19", False),
        ("5x = 18", "18", False),
        (r"\sqrt{324}", "18", True),
        (r"18\text{ m}", "18", True),
        ("18x", "18", False),
        (r"18\pi", "18", False),
        ("2 pi", "2", False),
        (r"\pm 18", "18", False),
        (r"17 \text{ and } 18", "18", False),
        ("18 or 20", "18", False),
        ("18:00", "18", False),
        ("18 and a half", "18", False),
        ("3!", "6", True),
        ("x + 1", "1 + x", True),
        (r"\frac{x}{2}", "0.5x", True),
        ("x > 3", "3 < x", True),
        ("18\x00", "18", False),
        ("\ud800", "18", False),
        ("\u0661\u0668", "18", False),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False),
        (r"\begin{cases} x = 1 \\ y = 2 \end{cases}", r"\begin{cases} x = 1 \\ y = 2 \end{cases}", True),
    ],
)
async def test_what_takes_algebra_goes_to_math_verify(
    grader: Grader, prediction: str, target: str, matched: bool
) -> None:
    assert await grader.match(prediction, target) == Verdict(matched=matched)


@pytest.mark.parametrize(
    ("prediction", "target", "matched"),
    [
        ("1/2^{81}", "1/2^{80}", False),
        ("2/2^{81}", "1/2^{80}", True),
        (r"\frac{1}{100!}", r"\frac{1}{99!}", False),
        (r"\left(\frac{35}{36}\right)^{2000}", r"\left(\frac{35}{36}\right)^{2001}", False),
        ("1 - 2^{-90}", "1 + 0", False),
        (r"\frac{\pi}{2^{80}}", r"\frac{\pi}{2^{81}}", False),
        (r"\frac{\pi}{2^{80}}", r"\frac{2\pi}{2^{81}}", True),
        ("e^{-40}", "e^{-41}", False),
        ("e^{-40}", r"\frac{1}{e^{40}}", True),
        (r"\sqrt{2} + 10^{-20}", r"\sqrt{2}", False),
        (r"\sqrt{2}\sqrt{3} - \sqrt{6}", "0", True),
        ("0.0000001", "10^{-8}", False),
        ("0.00000001", "10^{-8}", True),
        ("2^{-80}x", "2^{-81}x", False),
        (r"\sqrt{2}\sqrt{3}x", r"\sqrt{6}x", True),
        ("0.5x", r"\frac{x}{2}", True),
        ("(2^{-80}, 1)", "(2^{-81}, 1)", False),
        ("(2^{-80}, 1)", r"(\frac{1}{2^{80}}, 1)", True),
        (r"\{2^{-80}\}", r"\{2^{-81}\}", False),
        (r"[0, 2^{-80})", r"[0, 2^{-81})", False),
        ("x = 2^{-80}", "x = 2^{-81}", False),
        (r"\begin{pmatrix}2^{-80}&1\end{pmatrix}", r"\begin{pmatrix}2^{-81}&1\end{pmatrix}", False),
        (r"\begin{pmatrix}2^{-80}&1\end{pmatrix}", r"\begin{pmatrix}1/2^{80}&1\end{pmatrix}", True),
        ("2^{300000} + 1", "2^{300000}", False),
    ],
)
async def test_values_are_told_apart_however_small_their_difference(
    grader: Grader, prediction: str, target: str, matched: bool
) -> None:
    assert await grader.match(prediction, target) == Verdict(matched=matched)


@given(st.fractions(max_denominator=10**6))
def test_an_exact_fraction_is_read_back(value: object) -> None:
    number = read_number(clean_answer(str(value)))
    assert number is not None
    assert number.value == value


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9), st.sampled_from("f,"))
def test_a_decimal_is_read_back_with_and_without_separators(value: object, style: str) -> None:
    number = read_number(clean_answer(f"{value:,f}" if style == "," else f"{value:f}"))
    assert number is not None
    assert number.value == value


@given(
    st.lists(
        st.sampled_from(
            ["1", "0", ",", ".", " ", "-", "$", "%", "{", "}", "\\text{", "\\frac{", "=", "e9", "x", " eggs"]
        )
        | st.text(st.characters(), max_size=2),
        max_size=MAX_ANSWER_CHARS // 8,
    ).map("".join)
)
def test_reading_a_number_never_raises(text: str) -> None:
    read_number(clean_answer(text))


@pytest.mark.parametrize(
    "piece",
    [
        "{",
        "\\text{",
        "1 ",
        "1,000 ",
        "a ",
        "=",
        "x=",
        "$",
        " million",
        "\\,",
        "1/",
        "-",
        "1e",
        "\\\\ ",
        "\\! ",
        "{,}",
        "{ ",
        "½",
        "\u00b9\u2044\u2082",
        "²",
        " per ",
        " km",
        " squared",
        " of",
        "/",
        "≈",
        "\\frac{",
        "0.\\bar",
        "^{",
        "\u200b",
        "\u2013",
    ],
)
def test_the_exact_rules_are_quick_on_the_longest_answers(piece: str) -> None:
    text = (piece * MAX_ANSWER_CHARS)[:MAX_ANSWER_CHARS]
    start = time.thread_time()
    read_number(clean_answer(text))
    read_number(clean_answer("1" + text))
    assert time.thread_time() - start < 0.5


@pytest.mark.usefixtures("no_math_verify")
def test_an_answer_beyond_the_limit_is_refused_and_counted() -> None:
    grader = Grader()
    for hostile in ("{" * 10**6, "1" * 10**6, "\x00" * 10**6, "9^{" * 10**5):
        assert grader.match_sync(hostile, "18") == Verdict(matched=False, failure="too_long")
    assert (grader.num_graded, grader.failures["too_long"], grader.failures["timeout"]) == (4, 4, 0)
    assert grader.match_sync(" " * 10**6 + "18", "18") == RIGHT
    grader.close()


@pytest.mark.usefixtures("no_math_verify")
@pytest.mark.parametrize(
    "prediction",
    ["9^{9^{9}}", "9^9^9", r"10^{40^{601}}", "2^{999999}", "(x+1)^{99999}", "(a+b+c+d+e+f)^{50}", "1000000!", "(99!)!",
     r"\binom{10^9}{10^8}", r"\sum_{k}^{10^9} k", r"\prod_{k}^{99999999} k", r"\Gamma(10^8)", "(" * 17 + "18" + ")" * 17,
     "x+" * 300 + "1", r"\sqrt{" + "7" * 600 + "}", r"\frac{9^{9^9}}{9^{9^9}}", "((x+1)^{100})^{100}", "-" * 600 + "(18)"],
)  # fmt: skip
def test_what_is_hopeless_by_its_structure_is_not_tried(grader: Grader, prediction: str) -> None:
    before = grader.failures["too_complex"]
    assert grader.match_sync(prediction, "18") == Verdict(matched=False, failure="too_complex")
    assert grader.failures["too_complex"] == before + 1


def test_no_answer_of_competition_kind_is_refused_by_its_structure() -> None:
    pairs = competition()
    assert len(pairs) > 280
    assert [pair for pair in pairs if math.isinf(sum(map(cost, pair)))] == []


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [("(9*2)", 5), ("2^{2^{2^{2}}}", 13), ("2^{300000}", 5), (r"2^{\frac{2023}{2022}}", 11), ("3^{1+2+3+4+5+6+7+8+9}", 21),
     (r"\frac{2023!}{2022!}", 9), ("x^{999999999999}", 5), ("(-2)^{10000}", 8), (r"\left((3!)!\right)", 9), ("(x+1)^{2023}", 9),
     ("", 0), ("}" * 9, 9), ("!^_/", 4)],
)  # fmt: skip
def test_what_is_big_but_can_be_done_is_tried(answer: str, tokens: int) -> None:
    assert cost(answer) == tokens


async def test_starting_a_worker_does_not_count_against_the_deadline(hasty: Grader) -> None:
    assert await hasty.match("9*2", "18") == RIGHT


async def test_a_hostile_answer_costs_its_deadline_and_is_counted(hasty: Grader) -> None:
    before = (hasty.num_graded, hasty.failures["timeout"], hasty.failures["crash"])
    assert await hasty.match(HANGS, "18") == Verdict(matched=False, failure="timeout")
    assert await hasty.match("9*2", "18") == RIGHT
    assert (hasty.num_graded, hasty.failures["timeout"], hasty.failures["crash"]) == (
        before[0] + 2,
        before[1] + 1,
        before[2],
    )


async def test_a_sample_of_competition_answers_is_graded_without_a_failure(grader: Grader) -> None:
    sample = competition()[::10]
    verdicts = await asyncio.gather(*(grader.match(*pair) for pair in sample))
    assert [pair for pair, verdict in zip(sample, verdicts, strict=True) if verdict.failure] == []
    assert sum(verdict.matched for verdict in verdicts) > len(sample) / 2


async def test_answers_that_hang_do_not_hold_up_one_that_does_not() -> None:
    grader = Grader(num_workers=1, timeout_s=60.0)
    try:
        hanging = [asyncio.create_task(grader.match(f"{n} + {HANGS}", "18")) for n in range(4)]
        await asyncio.sleep(0)
        assert await grader.match("9*2", "18") == RIGHT
        await asyncio.sleep(1.0)  # By now some have left the quick lane, and none is near its deadline.
        assert await grader.match("2*9", "18") == RIGHT
        assert not any(task.done() for task in hanging)
    finally:
        await grader.aclose()
    assert all(isinstance(result, RuntimeError) for result in await asyncio.gather(*hanging, return_exceptions=True))


async def test_more_answers_that_hang_than_there_are_slow_places_all_time_out(hasty: Grader) -> None:
    verdicts = await asyncio.gather(*(hasty.match(f"{n} + {HANGS}", "18") for n in range(8)))
    assert verdicts == [Verdict(matched=False, failure="timeout")] * 8


async def test_a_question_that_is_open_already_is_not_asked_twice(grader: Grader) -> None:
    first = next(grader._pool._ids)
    assert await asyncio.gather(*(grader.match("3 * 6 * 1", "18") for _ in range(8))) == [RIGHT] * 8
    assert next(grader._pool._ids) == first + 2


async def test_a_worker_that_dies_is_a_crash_for_its_answer_and_no_other(grader: Grader) -> None:
    assert await grader.match("9*2", "18") == RIGHT
    crashes = grader.failures["crash"]
    for pid in forks(keeper(grader)):
        os.kill(pid, signal.SIGKILL)  # They have nothing to do, so that nobody notices.
        assert ended([pid])
    assert await grader.match("9*2", "18") == RIGHT
    assert grader.failures["crash"] == crashes
    pending = asyncio.create_task(grader.match(HANGS, "18"))
    while not pending.done():
        for pid in forks(keeper(grader)):
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
    assert await pending == Verdict(matched=False, failure="crash")
    assert grader.failures["crash"] == crashes + 1
    assert await grader.match("9*2", "18") == RIGHT


async def test_what_was_open_too_often_when_all_workers_died_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ludic.task.grading_pool.MAX_STARTS_PER_QUESTION", 1)
    grader = Grader(num_workers=1, timeout_s=60.0)
    pending = asyncio.create_task(grader.match(HANGS, "18"))
    assert await grader.match("9*2", "18") == RIGHT
    assert not pending.done()
    os.kill(keeper(grader), signal.SIGKILL)
    assert await pending == Verdict(matched=False, failure="crash")
    await grader.aclose()


async def test_workers_that_fall_silent_are_replaced_and_what_was_open_is_asked_again() -> None:
    grader = Grader(num_workers=1)
    grader._pool._silence_limit_s = 1.0
    assert await grader.match("9*2", "18") == RIGHT
    stopped = keeper(grader)
    os.kill(stopped, signal.SIGSTOP)
    pending = asyncio.create_task(grader.match("9*2", "18"))
    while is_alive(stopped):
        await asyncio.sleep(0.02)
    grader._pool._silence_limit_s = 60.0  # Those that come after it may be slow.
    assert await pending == RIGHT
    assert keeper(grader) != stopped
    await grader.aclose()


async def test_the_event_loop_runs_on_while_an_answer_is_graded(grader: Grader) -> None:
    await grader.match("9*2", "18")
    pending = asyncio.create_task(grader.match(HANGS, "18"))
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not pending.done()
    pending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pending
    assert await grader.match("9*2", "18") == RIGHT


def test_event_loops_one_after_the_other_and_other_threads_share_a_grader(grader: Grader) -> None:
    verdicts = [asyncio.run(grader.match("9*2", "18")) for _ in range(2)]
    threads = [threading.Thread(target=lambda: verdicts.append(grader.match_sync("2*9", "18"))) for _ in range(4)]
    threads.append(threading.Thread(target=lambda: verdicts.append(asyncio.run(grader.match("36/2 + 0", "18")))))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [RIGHT] * 7


async def test_closing_ends_the_workers_and_what_still_waits() -> None:
    grader = Grader(num_workers=1, timeout_s=60.0)
    assert await grader.match("9*2", "18") == RIGHT
    waiting = [asyncio.create_task(grader.match(f"{n} + {HANGS}", "18")) for n in range(3)]
    await asyncio.sleep(0.5)
    pids = [keeper(grader), *forks(keeper(grader))]
    assert len(pids) >= 2
    await grader.aclose()
    await grader.aclose()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, RuntimeError)
    assert ended(pids)
    with pytest.raises(RuntimeError, match="this Grader is closed"):
        await grader.match("9*2", "18")
    assert await grader.match("18.0", "18") == RIGHT  # What needs no worker still works.


def test_a_worker_that_cannot_start_is_an_error_and_not_a_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    grader = Grader()
    with pytest.raises(RuntimeError, match="ended while starting, with status 3"):
        grader.match_sync("9*2", "18")
    assert grader.num_graded == 0
    open_files = len(os.listdir("/dev/fd"))
    gc.disable()  # which would close what is left open, some time
    try:
        for target in ("19", "20", "21"):
            with pytest.raises(RuntimeError, match="ended while starting, with status 3"):
                grader.match_sync("9*2", target)
        assert len(os.listdir("/dev/fd")) == open_files
    finally:
        gc.enable()
    grader.close()


def test_a_grader_whose_thread_could_not_start_answers_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    grader = Grader(num_workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            grader.match_sync("9*2", "18")
    verdicts: list[Verdict] = []
    asking = threading.Thread(target=lambda: verdicts.append(grader.match_sync("9*2", "18")), daemon=True)
    asking.start()
    asking.join(30)
    assert verdicts == [RIGHT]
    grader.close()


@given(st.binary(max_size=60), st.binary(max_size=20))
@example(b"!^^_/", b"\x80")
def test_whatever_is_graded_the_promises_of_the_exact_rules_hold(prediction: bytes, target: bytes) -> None:
    check_pair(decode(prediction), decode(target))


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="num_workers must be at least 1, not 0"):
        Grader(num_workers=0)
    with pytest.raises(ValueError, match="timeout_s must be more than 0 seconds, not 0"):
        Grader(timeout_s=0)


SCRIPT = """
import sys
from ludic.task.grading import answers_match
assert answers_match("9*2", "18") and not answers_match("9*3", "18")
print("math_verify" in sys.modules)
"""


def test_a_script_without_a_main_guard_grades_imports_no_math_verify_and_exits_quietly(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-W", "error::ResourceWarning", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


ORPHANS = f"""
from ludic.task.grading import Grader
grader = Grader(num_workers=1, timeout_s=60.0)
grader.match_sync("9*2", "18")
print(grader._pool._process.popen.pid, flush=True)
grader.match_sync(r"{HANGS}", "18")
"""


def test_workers_of_a_killed_parent_end_by_themselves() -> None:
    # From standard input: a main module without a file.
    with subprocess.Popen([sys.executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(ORPHANS)
        parent.stdin.close()
        first = int(parent.stdout.readline())
        time.sleep(0.5)  # Until a fork is busy with an answer that never ends.
        workers = [first, *forks(first)]
        assert len(workers) == 2
        parent.kill()
    assert ended(workers)


def test_answers_match_blocks_no_longer_than_it_says_even_if_its_worker_gets_no_cpu() -> None:
    assert answers_match("9*2", "18")
    for pid in forks(keeper(_default_grader())):
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    assert not answers_match("9 * 2 + 0", "18")
    assert time.monotonic() - start < MATCH_LIMIT_S + 1.0
    assert answers_match("9 * 2 + 0", "18")


def test_answers_match_is_the_same_rule_for_scripts() -> None:
    assert answers_match(r"\$1,000.00", "1000")
    assert answers_match("18%", "18")
    assert answers_match(r"\frac{36}{2}", "18")

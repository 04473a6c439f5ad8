"""A tool is a function in a process that can be killed, and the calculator is one that no expression keeps busy."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from ludic.task import calculator
from ludic.task.calculator import calculate
from ludic.task.tools import Tool, ToolReply

HOSTILE = """
import os, sys, time
def reply(text):
    if text == "hang":
        while True: pass
    if text == "exit":
        os._exit(3)
    if text == "raise":
        raise ValueError(text)
    if text == "memory":
        return str(len(bytearray(10**10)))
    if text == "long":
        return "x" * 10**6
    if text == "print":
        print("not a reply")
    if text == "secret":
        return str(os.environ.get("LUDIC_API_KEY"))
    return f"{os.getpid()}:{text}"
"""


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48/2", "24"),
        ("1,200 * 3", "3600"),
        ("0.1 + 0.2", "0.3"),
        ("-(2 + 3) ** 2", "-25"),
        ("10 / 3", "3.333333333"),
        ("$5 \u00d7 3 \u00f7 2", "7.5"),
        ("2^10", "1024"),
        ("9" * 150, "9" * 150),
        ("100000000000000000.25 - 100000000000000000", "0.25"),
        ("1e-100 * 1e100", "1"),
        ("1_0.5 + .5 + 1.", "12"),
        ("0x10", "16"),
    ],
)
def test_arithmetic_is_exact(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "__import__('os').system('true')",
            "(lambda: 1)()",
            "a",
            "",
            "\0",
            "\ud800",
            "[1] * 9",
            "'9' * 9",
            "True",
            "1 if 1 else 2",
        ),
        *(
            "1/0",
            "0 ** -1",
            "2 ** 0.5",
            "9 ** 9 ** 9",
            "2 ** -99999",
            "1e300",
            "1e-400",
            "1e-999999999",
            "1.5e999999999",
            "1e999",
            "9" * 190,
            "(" * 199,
            "-" * 199,
        ),
        *("1 << 9", "10 % 3", "7 // 2", "1j", "1 +", "1;2", "1\n2", "x := 1", "*".join(["9999"] * 40), "1" * 201),
    ],
)
def test_what_is_not_small_arithmetic_is_an_error_and_never_worked_out(expression: str) -> None:
    assert calculate(expression).startswith("error: ")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE)
    return path


async def test_a_tool_answers_from_one_process_after_another_call(hostile: Path) -> None:
    async with contextlib.aclosing(Tool(hostile, "reply", timeout_s=30)) as tool:
        first, second = [await tool(text) for text in ("a\nb", "print")]
    assert first.text.endswith(":a\nb") and second.text.endswith(":print")
    assert first.text.partition(":")[0] == second.text.partition(":")[0]


@pytest.mark.parametrize("text", ["exit", "raise", "memory", "long"])
async def test_a_call_that_breaks_its_process_is_a_crash_and_the_next_one_has_another(hostile: Path, text: str) -> None:
    async with contextlib.aclosing(Tool(hostile, "reply", timeout_s=30)) as tool:
        before = await tool("x")
        assert await tool(text) == ToolReply(failure="crash")
        after = await tool("x")
    assert after.text.endswith(":x") and after.text != before.text and tool.failures == {"crash": 1}


async def test_a_process_that_dies_while_it_is_idle_costs_no_call(hostile: Path) -> None:
    async with contextlib.aclosing(Tool(hostile, "reply", num_workers=2, timeout_s=30)) as tool:
        for known_to_be_dead in (True, False):
            replies = await asyncio.gather(tool("x"), tool("y"))
            pids = [int(reply.text.partition(":")[0]) for reply in replies]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            if known_to_be_dead:
                await asyncio.gather(*(worker.wait() for worker in tool._idle))
            after = await tool("z")
            assert after.text.endswith(":z") and int(after.text.partition(":")[0]) not in pids
    assert not tool.failures


async def test_a_call_that_hangs_is_killed_at_its_deadline(hostile: Path) -> None:
    async with contextlib.aclosing(Tool(hostile, "reply", timeout_s=2)) as tool:
        assert (await tool("x")).failure is None  # the process is up
        assert await tool("hang") == ToolReply(failure="timeout")
        assert (await tool("x")).failure is None


async def test_a_tool_is_not_given_secrets(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUDIC_API_KEY", "k")
    async with contextlib.aclosing(Tool(hostile, "reply", timeout_s=30)) as tool:
        assert (await tool("secret")).text == "None"


async def test_the_calculator_is_a_tool() -> None:
    async with contextlib.aclosing(Tool(Path(calculator.__file__), "calculate", timeout_s=30)) as tool:
        assert await tool("3 * 4") == ToolReply(text="12")
        assert (await tool("9 ** 9 ** 9")).text == "error: the value is too large"


def test_impossible_settings_of_a_tool_are_one_line(hostile: Path) -> None:
    with pytest.raises(ValueError, match="num_workers must be at least 1, not 0"):
        Tool(hostile, "reply", num_workers=0)
    with pytest.raises(ValueError, match="timeout_s must be more than 0 seconds, not 0"):
        Tool(hostile, "reply", timeout_s=0)

r"""The child process of `ludic.grading.Grader`: asks math-verify whether two answers are equal, one pair after another.

It is run as a file, `python -P grading_worker.py FD`, not as `ludic.grading_worker` and not by multiprocessing: that
way it imports math-verify and nothing else (no torch, not the caller's main module), needs no
`if __name__ == "__main__"` in the caller's script, and starts as fast as math-verify allows. It must therefore import
nothing from ludic.

FD is one end of a socket pair. First it sends "ready"; then each job `{"predictions": [...], "target": str,
"limit_s": float}` is answered with `true`, `false`, or the name of the resource that ran out. All messages are JSON in
ASCII, so that lone surrogates and null bytes pass. The parent enforces the deadline; nothing here can be trusted to.
"""

import json
import logging
import signal
import sys
from multiprocessing.connection import Connection

MAX_MEMORY_BYTES = 4 * 2**30
"""Address space that one worker may take, on Linux. math-verify itself needs well under 1 GiB."""


def all_match(predictions: list[str], target: str) -> bool:
    """Whether math-verify finds every prediction equal to `target`.

    Both are parsed inside a box, as LaTeX only: on raw strings math-verify 0.9 rates `18.0` unequal to `18`, and its
    plain-text extraction picks numbers out of prose. Its own time limits are off: they need SIGALRM in the main thread.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(answer: str) -> list[object]:
        result: list[object] = parse(
            rf"\boxed{{{answer}}}",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )
        return result

    try:
        gold = parsed(target)
        return all(verify(gold, parsed(answer), timeout_seconds=None, raise_on_error=True) for answer in predictions)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # What math-verify cannot read or compare is not equal; it raises anything, from sympy's depths.
        return False


def main(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches the whole group; the parent decides.
    # The default action of SIGALRM ends the process even inside one long C call: no orphan outlives its answer by much.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    logging.disable(logging.CRITICAL)
    all_match([r"\sqrt{4}"], "2")  # Builds the parser's tables, which takes longer than most answers.
    connection.send_bytes(b'"ready"')
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):  # The parent is gone.
            return
        signal.setitimer(signal.ITIMER_REAL, job["limit_s"])
        reply: bool | str
        try:
            reply = all_match(job["predictions"], job["target"])
        except (MemoryError, RecursionError) as error:
            reply = type(error).__name__
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

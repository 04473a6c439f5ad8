"""The child process of `ludic.task.tools.Tool`: calls one function of one file, on a line of JSON at a time.

It is run as a file, `python -P tool_worker.py FILE FUNCTION SECONDS`, so that it imports nothing of ludic and nothing of the
caller's. Each line of standard input is a JSON string; the reply is the line of the function's result. Standard input ends
with the parent, and this process with it; in the middle of a call, an alarm ends it after SECONDS.
"""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable

MAX_MEMORY_BYTES = 2**29
"""Address space, on Linux."""


def main(path: str, name: str, seconds: float) -> None:
    spec = importlib.util.spec_from_file_location("tool", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[[str], str] = getattr(module, name)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a tool prints is no reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even inside one long call of C
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = json.dumps(function(json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))

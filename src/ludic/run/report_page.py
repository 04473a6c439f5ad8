"""The report page at the end of a training or an evaluation, whichever way it ends. It never costs the run anything else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ludic.cli import say
from ludic.storage.inert import inert


def write_page(lines: Path, page: Path) -> bool:
    """Whether the page of the run whose metrics or records are `lines` was written; where it was not, why is said in one line."""
    from ludic.report.page import write_report

    try:
        write_report([lines], page)
    except Exception as error:  # of any kind: the run is over, and its files are whole
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        say(f"no report page: {inert(reason)}")
        return False
    return True


@contextlib.contextmanager
def page_at_an_early_end(lines: Path, page: Path) -> Iterator[None]:
    """Writes the page where the block is left by an error or a cancellation.

    It takes seconds, and a run that was told to end may have few of them: enter it before what saves the work, so that it comes
    after. A second signal leaves without it.
    """
    try:
        yield
    except BaseException:
        if lines.exists() and lines.stat().st_size and write_page(lines, page):
            say(f"report of what is done: {page}")
        raise

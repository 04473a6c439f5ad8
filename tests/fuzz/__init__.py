"""Coverage-guided fuzzing, run by a person: `scripts/fuzz.sh MINUTES [NAME]`. See README.md beside this file."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def start(seeds: Iterable[bytes], check: Callable[[bytes], None]) -> None:
    """Hand `check` to atheris, with the rest of the command line. Does not return.

    libFuzzer writes what it finds interesting into the first folder that it is given; without one that is `.corpus_NAME`
    beside the program, which the next run begins with.
    """
    import atheris

    folders = [Path(word) for word in sys.argv[1:] if not word.startswith("-")]
    words = sys.argv
    if not folders:
        program = Path(sys.argv[0])
        folders = [program.with_name(program.stem.replace("fuzz_", ".corpus_"))]
        words = [*sys.argv, str(folders[0])]
    if not folders[0].is_file():  # a file is a case to be tried once
        folders[0].mkdir(exist_ok=True)
        for number, seed in enumerate(seeds):
            (folders[0] / f"seed{number}").write_bytes(seed)
    atheris.Setup(words, check)
    atheris.Fuzz()

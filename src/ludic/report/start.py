"""What a run was started with, in a file beside its metrics: the command, the settings, versions and the machine.

A checkpoint has the settings too, but a run that goes on may not have written one yet, and what a package's version was is
gone when the run is over.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

from ludic.versions import installed_versions


def write_start(path: Path, *, command: str, settings: Mapping[str, object]) -> None:
    """Write the file whole or not at all; `settings` are of the run and its task, each a JSON value.

    Raises:
        OSError: it cannot be written.
    """
    record = {
        "command": command,
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_cores": os.cpu_count(),
            "gpus": gpu_names(),
        },
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def gpu_names() -> list[str]:
    """The GPU that trains, where torch is loaded and has one; torch is not loaded for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(torch.cuda.current_device())]

"""Which versions are installed: what `--version` prints, and what a run's files say. Nothing of them is imported for it."""

import argparse
import importlib.metadata
import platform
import sys

PACKAGES = ("ludic", "torch", "transformers", "vllm", "numpy", "safetensors", "math-verify", "aiohttp", "bokeh")


def installed_versions() -> dict[str, str]:
    """Of the packages that decide what a run computes, and how fast."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def add_version_argument(parser: argparse.ArgumentParser) -> None:
    """`--version`, which prints one line and ends the program."""
    parser.add_argument("--version", action=_Print, nargs=0, default=argparse.SUPPRESS,
                        help="print the versions of ludic, of Python and of what they run on, and exit")  # fmt: skip


class _Print(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_of_the_flag: object) -> None:
        named = {"Python": platform.python_version(), **installed_versions()}
        ludic = named.pop("ludic", "of a folder that is not installed")
        others = ", ".join(f"{name} {version}" for name, version in named.items())
        sys.stdout.write(f"ludic {ludic} ({others})\n")
        parser.exit()

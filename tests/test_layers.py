"""Which part of ludic may import which: `src/ludic` is a list of rooms, and imports go down that list only."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/ludic"

ROOMS = (
    "types",
    "config_checks",
    "config",
    "commands",
    "completion",
    "versions",
    "storage",
    "task",
    "rollout",
    "train",
    "inference",
    "survival",
    "telemetry",
    "compare",
    "cli",
    "flags",
    "config_file",
    "report",
    "forecast",
    "capacity",
    "doctor",
    "run",
)
"""From the bottom up: each may import those before it."""

PROCESSES = {
    "inference.client": {"inference.client", "inference.weights", "inference.wire", "inference.cleanup"},
    "inference.weights": {"inference.client", "inference.weights", "inference.wire", "inference.cleanup"},
    "inference.server": {"inference.server", "inference.wire"},
    "inference.worker": {"inference.worker", "inference.weights", "inference.wire"},
}
"""A folder of `inference` is a process: what it may import there. The trainer's end of a weight sync asks the client."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(module: str) -> set[str]:
    """The modules of ludic that `module` imports, also inside functions and for type checking alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module} has a relative import"
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            inside = name.removeprefix("ludic.") if name.startswith("ludic.") else ""
            found |= {one for one in (inside, inside.rpartition(".")[0]) if one in MODULES and one}
    return found - {module}


IMPORTS = {module: imports_of(module) for module in MODULES if module}


def cycle_from(start: str) -> list[str] | None:
    """A chain of imports that leads back to `start`."""
    ways, seen = [[start]], set[str]()
    while ways:
        way = ways.pop()
        for following in IMPORTS[way[-1]] - seen:
            if following == start:
                return [*way, start]
            seen.add(following)
            ways.append([*way, following])
    return None


def reached_from(starts: Iterable[str]) -> set[str]:
    """All modules that are loaded with `starts`, were every import at the top of its file."""
    reached, new = set[str](), set(starts)
    while new:
        reached |= new
        new = set().union(*(IMPORTS[module] for module in new)) - reached
    return reached


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_room_stands_in_the_list_and_the_list_has_no_other() -> None:
    assert {room(module) for module in IMPORTS} == set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_down_the_list_of_rooms_only(name: str) -> None:
    allowed = ROOMS[: ROOMS.index(name) + 1]
    upward = {
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        if room(module) == name
        for target in targets
        if room(target) not in allowed
    }
    assert not upward


def test_the_core_reaches_neither_the_server_nor_survival_nor_telemetry() -> None:
    core = [module for module in IMPORTS if room(module) in ("task", "rollout", "train")]
    assert not {module for module in reached_from(core) if room(module) in ("inference", "survival", "telemetry")}


@pytest.mark.parametrize("folder", PROCESSES)
def test_a_folder_of_inference_imports_nothing_of_another_process(folder: str) -> None:
    inside = [module for module in IMPORTS if module.startswith(folder + ".")]
    others = {
        f"{module} imports {target}"
        for module in inside
        for target in IMPORTS[module]
        if room(target) == "inference" and not any(target.startswith(one) for one in PROCESSES[folder])
    }
    assert inside and not others - {f"{module} imports inference" for module in inside}


def test_the_worker_loads_nothing_that_runs_in_the_trainer_or_the_front_end() -> None:
    worker = [module for module in IMPORTS if module.startswith("inference.worker.")]
    assert not {one for one in reached_from(worker) if one.startswith(("inference.client", "inference.server"))}


@pytest.mark.parametrize("module", IMPORTS)
def test_no_module_imports_itself_in_a_circle(module: str) -> None:
    assert cycle_from(module) is None


@pytest.mark.parametrize("module", IMPORTS)
def test_a_name_says_what_the_module_holds(module: str) -> None:
    assert not set(module.split(".")) & {"beside", "flat", "leftovers", "here", "engines", "utils", "helpers", "common"}

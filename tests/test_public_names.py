"""The public names of the package: sorted, real, and no slower to import than they have to be."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import ludic


def test_the_public_names_are_sorted_as_ruff_sorts_them_and_each_is_there_once() -> None:
    constants = [name for name in ludic.__all__ if name.isupper()]
    classes = [name for name in ludic.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in ludic.__all__ if name[0].islower()]
    assert ludic.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    assert len(set(ludic.__all__)) == len(ludic.__all__)


@pytest.mark.parametrize("name", ludic.__all__)
def test_a_public_name_is_what_its_module_defines_and_says_what_it_is(name: str) -> None:
    value = getattr(ludic, name)
    module = importlib.import_module(f"ludic.{ludic._HOMES[name]}")
    assert value is getattr(module, name)
    assert value.__module__ == module.__name__, f"{name} is defined elsewhere"
    assert value.__doc__ and name in dir(ludic)


def test_type_checkers_are_told_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(ludic.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    told = {alias.name: (node.module or "").removeprefix("ludic.") for node in imports for alias in node.names}
    assert told == ludic._HOMES
    assert set(told) == set(ludic.__all__)


def test_an_unknown_name_is_an_attribute_error_with_the_name() -> None:
    with pytest.raises(AttributeError, match="'ludic' has no attribute 'Agent'"):
        ludic.Agent  # type: ignore[attr-defined]  # noqa: B018


def test_importing_ludic_alone_loads_nothing_heavy() -> None:
    program = "import sys, ludic; print(sorted({'torch', 'transformers', 'vllm', 'aiohttp'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

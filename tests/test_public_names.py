"""The public names of `ludic`: sorted, importable, documented, and cheap until they are used."""

import ast
import importlib
import inspect
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import ludic

NAMES = ludic.__all__


def _type_checking_imports() -> dict[str, str]:
    """What a type checker sees in `ludic/__init__.py`: public name -> module."""
    tree = ast.parse(Path(ludic.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_the_public_names_are_sorted_and_listed_once() -> None:
    assert sorted(set(NAMES)) == NAMES


def test_the_loaded_names_are_those_that_a_type_checker_sees() -> None:
    homes = {name: f"ludic.{home}" for name, home in ludic._HOMES.items()}
    assert homes == _type_checking_imports()
    assert list(homes) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    value = getattr(ludic, name)
    assert value is getattr(importlib.import_module(f"ludic.{ludic._HOMES[name]}"), name)
    assert value.__module__ == f"ludic.{ludic._HOMES[name]}", "defined elsewhere: name its home, not a re-export"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(ludic, name)
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc is not None and doc.strip()
    assert not (is_dataclass(value) and doc.startswith(f"{name}(")), "a signature made by dataclass says nothing"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ludic' has no attribute 'GRPO'"):
        ludic.GRPO  # type: ignore[attr-defined] # noqa: B018


def test_dir_lists_the_public_names() -> None:
    assert set(NAMES) <= set(dir(ludic))


def test_importing_ludic_loads_neither_torch_nor_transformers_nor_vllm() -> None:
    heavy = "{'torch', 'transformers', 'vllm', 'datasets', 'matplotlib', 'wandb'}"
    script = f"import sys, ludic; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

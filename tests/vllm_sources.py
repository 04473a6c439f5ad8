"""Holds a version of vLLM against `vllm_contract` by its source files alone: nothing of vLLM is imported or run.

Names are followed through imports, as far as they lead inside vLLM. A name that another package defines counts as there, but
not what a class may inherit from there.
"""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.vllm_contract import ALWAYS, EITHER, SUBCLASSES, Uses

ROOT = Path(__file__).resolve().parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
_PROPERTIES = {"property", "cached_property", "abstractproperty"}


class MissingError(Exception):
    """What ludic uses is not there, or not as ludic uses it."""


@dataclass(frozen=True)
class Found:
    """What a name stands for."""

    node: ast.AST | None
    """Its statement; None for what lies outside vLLM, or is assigned a value that says nothing."""
    module: str
    """Where the statement is, and so where the names in it mean something."""
    bound: bool = False
    """Whether a call passes the first parameter by itself."""


OUTSIDE = Found(None, "")


class Sources:
    """The source files of one version.

    Args:
        read: the text of a file by its path ("vllm/logger.py"); None where there is no such file.
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._trees: dict[str, tuple[ast.Module, bool] | None] = {}

    def tree(self, module: str) -> tuple[ast.Module, bool] | None:
        """A module's statements, and whether it is a package; None where there is no such module."""
        if module not in self._trees:
            self._trees[module] = None
            for path, is_package in ((".py", False), ("/__init__.py", True)):
                text = self._read(module.replace(".", "/") + path)
                if text is not None:
                    self._trees[module] = _parsed(text), is_package
                    break
        return self._trees[module]

    # --- names ----------------------------------------------------------------------------------------------------------

    def name(self, module: str, name: str) -> Found:
        """What `name` is in a module. Raises MissingError."""
        entry = self.tree(module)
        if entry is None:
            raise MissingError(f"no module {module}")
        found: Found | None = None
        for statement in _statements(entry[0].body):
            found = self._defined(statement, module, name) or found
        if found is not None:
            return found
        if self.tree(f"{module}.{name}") is not None:
            return Found(self.tree(f"{module}.{name}")[0], f"{module}.{name}")  # type: ignore[index]
        raise MissingError(f"no {name} in {module}")

    def _defined(self, statement: ast.stmt, module: str, name: str) -> Found | None:
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if statement.name == name:
                return None if "overload" in _decorators(statement) else Found(statement, module)
            case ast.Assign() | ast.AnnAssign() if name in _targets(statement):
                return self._assigned(statement, module)
            case ast.ImportFrom():
                for alias in statement.names:
                    if (alias.asname or alias.name) == name:
                        home = self._home(statement, module)
                        return self.name(home, alias.name) if home.partition(".")[0] == "vllm" else OUTSIDE
            case ast.Import() if any(
                (alias.asname or alias.name.partition(".")[0]) == name for alias in statement.names
            ):
                return OUTSIDE
        return None

    def _assigned(self, statement: ast.Assign | ast.AnnAssign, module: str) -> Found:
        """What an assignment's target is: the function or class that it is another name of, else a value."""
        value = statement.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "staticmethod":
            value = value.args[0]
        if isinstance(value, ast.Name):
            try:
                return self.name(module, value.id)
            except MissingError:
                pass
        return Found(statement, module)

    def _home(self, statement: ast.ImportFrom, module: str) -> str:
        if not statement.level:
            return statement.module or ""
        entry = self.tree(module)
        drop = statement.level - (1 if entry is not None and entry[1] else 0)
        parts = module.split(".")
        return ".".join([*parts[: len(parts) - drop], *([statement.module] if statement.module else [])])

    # --- members --------------------------------------------------------------------------------------------------------

    def member(self, owner: Found, name: str) -> Found:
        """What `owner.name` is. Raises MissingError."""
        node = owner.node
        if isinstance(node, ast.Module):
            return self.name(owner.module, name)
        if isinstance(node, ast.AnnAssign):  # a value with a type
            owner = self._expression(node.annotation, owner.module)
            return self.member(owner, name)
        if isinstance(node, ast.ClassDef):
            for cls in self.lineage(owner):
                found = self._own_member(cls, name) if cls.node is not None else None
                if found is not None:
                    return found
            raise MissingError(f"no {name} in {node.name}")
        if isinstance(node, Function):
            if any(isinstance(part, ast.Attribute) and part.attr == name for part in _stored(node)):
                return Found(None, owner.module)
            raise MissingError(f"{node.name} assigns no {name}")
        raise MissingError(f"{name} of what is not known")

    def lineage(self, cls: Found) -> Iterator[Found]:
        """A class and its bases, nearest first; OUTSIDE at the end if one of them lies outside vLLM."""
        yield cls
        assert isinstance(cls.node, ast.ClassDef)
        for base in cls.node.bases:
            found = self._expression(base, cls.module)
            if isinstance(found.node, ast.ClassDef):
                yield from self.lineage(found)
            elif not _is_plain_base(base):
                yield OUTSIDE

    def _expression(self, node: ast.expr, module: str) -> Found:
        """What a base class or an annotation stands for."""
        if isinstance(node, ast.Subscript):
            node = node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        try:
            if isinstance(node, ast.Attribute):
                return self.member(self._expression(node.value, module), node.attr)
            return self.name(module, node.id) if isinstance(node, ast.Name) else OUTSIDE
        except MissingError:  # a builtin
            return OUTSIDE

    def _own_member(self, cls: Found, name: str) -> Found | None:
        found: Found | None = None
        body = cls.node.body  # type: ignore[union-attr]
        for statement in _statements(body):
            if isinstance(statement, Function) and statement.name == name:
                if "overload" not in (marks := _decorators(statement)):
                    found = Found(statement, cls.module, bound="staticmethod" not in marks)
            elif isinstance(statement, ast.Assign | ast.AnnAssign) and name in _targets(statement):
                found = self._assigned(statement, cls.module)
        if found is None and any(
            isinstance(part, ast.Attribute) and part.attr == name and getattr(part.value, "id", "") == "self"
            for part in _stored(cls.node)
        ):
            found = Found(None, cls.module)
        return found

    # --- calls ----------------------------------------------------------------------------------------------------------

    def check_call(self, found: Found, call: ast.Call) -> None:
        """Raises MissingError unless the call fits what is called."""
        signature = self._signature(found)
        if signature is None:
            return
        args = [one for one in call.args if not (isinstance(one, ast.Constant) and one.value is ...)]
        bind = signature.bind if len(args) == len(call.args) else signature.bind_partial
        try:
            bind(*args, **{keyword.arg or "": keyword.value for keyword in call.keywords})
        except TypeError as error:
            raise MissingError(f"{ast.unparse(call)} does not fit {signature}: {error}") from error

    def _signature(self, found: Found) -> inspect.Signature | None:
        """The parameters of a function or class; None where they cannot be known."""
        if isinstance(found.node, Function):
            if _PROPERTIES & _decorators(found.node):
                raise MissingError(f"{found.node.name} is a property, and is called")
            return inspect.Signature(_parameters(found.node)[1 if found.bound else 0 :])
        if not isinstance(found.node, ast.ClassDef):
            return None
        lineage = list(self.lineage(found))
        makes_fields = any(_makes_fields(cls.node) for cls in lineage)
        if OUTSIDE in lineage and not makes_fields:
            return None
        fields: dict[str, inspect.Parameter] = {}
        for cls in reversed(lineage):
            init = self._own_member(cls, "__init__") if cls.node is not None else None
            if init is not None and isinstance(init.node, Function):
                fields = {one.name: one for one in _parameters(init.node)[1:]}
            elif makes_fields:
                fields |= {one.name: one for one in _fields(cls.node)}
        return inspect.Signature(sorted(fields.values(), key=lambda one: (one.kind, one.default is not one.empty)))

    # --- the list -------------------------------------------------------------------------------------------------------

    def check(self, module: str, use: str) -> None:
        """Raises MissingError unless a module has what ludic uses of it, in the notation of `vllm_contract`."""
        node = ast.parse(use, mode="eval").body
        if isinstance(node, ast.Constant):
            _check_text(self.name(*module.rsplit(".", 1)), str(node.value))
        elif isinstance(node, ast.Call):
            self.check_call(self._used(module, node.func), node)
        else:
            self._used(module, node)

    def _used(self, module: str, node: ast.expr) -> Found:
        if isinstance(node, ast.Attribute):
            return self.member(self._used(module, node.value), node.attr)
        if isinstance(node, ast.Subscript):
            assert isinstance(node.slice, ast.Constant)
            found = self._used(module, node.value)
            _check_text(found, str(node.slice.value))
            return found
        assert isinstance(node, ast.Name)
        return self.name(module, node.id)


def problems(sources: Sources) -> list[str]:
    """What of the list this version does not have, a line each; empty if it has all."""
    found = _problems(sources, ALWAYS)
    for alternatives in EITHER:
        failures = [_problems(sources, uses) for uses in alternatives]
        if all(failures):
            found.append("none of: " + " | ".join("; ".join(lines) for lines in failures))
    for base, classes in SUBCLASSES.items():
        module, _, name = base.partition(":")
        for place in classes:
            path, _, cls = place.partition(":")
            missing = _abstract(sources, sources.name(module, name)) - _defined_names(ROOT / path, cls)
            if missing:
                found.append(f"{module}: {cls} lacks {', '.join(sorted(missing))}, abstract in {name}")
    return found


def _problems(sources: Sources, uses: Uses) -> list[str]:
    found = []
    for module, names in uses.items():
        if sources.tree(module) is None:
            found.append(f"no module {module}")
            continue
        for use in names:
            try:
                sources.check(module, use)
            except MissingError as error:
                found.append(f"{module}: {error}")
    return found


def _abstract(sources: Sources, base: Found) -> set[str]:
    names: dict[str, bool] = {}
    for cls in sources.lineage(base):
        for statement in cls.node.body if isinstance(cls.node, ast.ClassDef) else ():
            if isinstance(statement, Function):
                names.setdefault(statement.name, "abstractmethod" in _decorators(statement))
    return {name for name, is_abstract in names.items() if is_abstract}


def _defined_names(path: Path, cls: str) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (node,) = (one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == cls)
    names = {one.name for one in node.body if isinstance(one, Function)}
    return names.union(*(_targets(one) for one in node.body if isinstance(one, ast.Assign | ast.AnnAssign)))


def imported(text: str) -> set[tuple[str, str]]:
    """Each module of vLLM that a source file imports, and each name from it ("" for the module itself)."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.partition(".")[0] == "vllm"}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "vllm":
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def listed() -> dict[str, set[str]]:
    """The modules of the list, with the first names of what is used of them."""
    found: dict[str, set[str]] = {}
    for uses in (ALWAYS, *(one for alternatives in EITHER for one in alternatives)):
        for module, names in uses.items():
            found.setdefault(module, set()).update(
                use.partition("(")[0].partition(".")[0].partition("[")[0] for use in names
            )
    return found


@cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, those in its `if`, `try` and `with` too."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                for inner in getattr(statement, part, ()):
                    yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _targets(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _stored(node: ast.AST | None) -> Iterator[ast.AST]:
    for part in ast.walk(node) if node is not None else ():
        if isinstance(getattr(part, "ctx", None), ast.Store):
            yield part


def _decorators(node: ast.ClassDef | Function) -> set[str]:
    parts = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return {one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "") for one in parts}


def _is_plain_base(base: ast.expr) -> bool:
    """Bases that bring no members which ludic could mean."""
    return ast.unparse(base).partition("[")[0] in {"ABC", "Generic", "Protocol", "object"}


def _parameters(node: Function) -> list[inspect.Parameter]:
    args, kinds = node.args, inspect.Parameter
    plain = args.posonlyargs + args.args
    num_required = len(plain) - len(args.defaults)
    found = [
        kinds(
            one.arg,
            kinds.POSITIONAL_ONLY if index < len(args.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if index < num_required else None,
        )
        for index, one in enumerate(plain)
    ]
    if args.vararg:
        found.append(kinds(args.vararg.arg, kinds.VAR_POSITIONAL))
    for one, value in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(kinds(one.arg, kinds.KEYWORD_ONLY, default=kinds.empty if value is None else None))
    if args.kwarg:
        found.append(kinds(args.kwarg.arg, kinds.VAR_KEYWORD))
    return found


def _makes_fields(node: ast.AST | None) -> bool:
    """Whether a class's fields are parameters of its constructor: a dataclass, a configuration of vLLM's, a struct."""
    if not isinstance(node, ast.ClassDef):
        return False
    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
    return bool(_decorators(node) & {"dataclass", "config"} or bases & {"Struct", "BaseModel", "NamedTuple"})


def _fields(node: ast.AST | None) -> list[inspect.Parameter]:
    """The parameters that a dataclass or struct makes of its fields."""
    found, kinds = [], inspect.Parameter
    for statement in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            value = "" if statement.value is None else ast.unparse(statement.value)
            has_default = bool(value) and not (value.startswith("field(") and "default" not in value)
            kind = kinds.KEYWORD_ONLY if "kw_only=True" in value else kinds.POSITIONAL_OR_KEYWORD
            (name,) = _targets(statement)
            found.append(kinds(name, kind, default=None if has_default else kinds.empty))
    return found


def _check_text(found: Found, text: str) -> None:
    for part in ast.walk(found.node) if found.node is not None else ():
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and text in part.value:
            return
        if isinstance(part, ast.arg) and part.arg == text:  # a field of a route's body
            return
    raise MissingError(f"no text {text!r} in {getattr(found.node, 'name', found.module)}")

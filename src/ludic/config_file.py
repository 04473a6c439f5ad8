"""`--config run.toml`: the flags of a run in a file, and the file that every run leaves so that it can be repeated.

A key is the long name of a flag, with `-` or `_`, at the top level of the file. The file's values are put in front of the
words of the command line, so that a flag that was given wins, and argparse treats both alike. Left out: tables, and flags that
say what to do now (`NOT_IN_A_FILE`), which a file must not repeat by itself.
"""

import argparse
import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ludic.completion import add_completion_argument
from ludic.config import GRPOConfig, number_or_auto
from ludic.flags import add_evaluation_arguments, add_run_arguments
from ludic.storage.inert import inert
from ludic.versions import add_version_argument, installed_versions

Value = str | int | float | bool | list[str]
NOT_IN_A_FILE = ("resume", "resume_eval", "overwrite", "forecast")
"""Flags that say what to do now, by the names of their settings."""
_TOML_TYPES: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), str: (str,)}
_EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a string in quotes",
    number_or_auto: 'a whole number or "auto"',
}
_NO_FLAGS = ("help", "config", "print_completion", "version")


class RunParser(argparse.ArgumentParser):
    """The parser of a training or an evaluation: its flags may also stand in the file that `--config` names.

    The namespace has `resolved`: each flag with its value, as they were parsed, by the titles of the groups of flags.

    Example:
        parser = RunParser(description="Train a model to add two numbers.")
        add_run_arguments(parser)
        args = parser.parse_args(["--config", "run.toml", "--train-steps", "20"])

    With `passes_over` the file may also hold keys of a training that are no flags of this parser: the doctor reads the file of
    any training script. The namespace has those that no training has by itself in `passed_over`, since one may be a typo.
    """

    def __init__(self, *, passes_over: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._passes_over = passes_over
        group = self.add_argument_group("configuration")
        group.add_argument("--config", metavar="FILE",
                           help="a TOML file of flags; those on the command line win")  # fmt: skip
        add_completion_argument(self)
        add_version_argument(self)

    def set_flag_defaults(self, flags: Mapping[str, str]) -> None:
        """Give flags other defaults, with the words of a command line: `{"--lr": "5e-4"}`."""
        self.set_defaults(**{self._option_string_actions[name].dest: text for name, text in flags.items()})

    def error(self, message: str) -> NoReturn:
        """One line, with the nearest flag for one that there is not, in place of argparse's usage of all flags."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        nearest = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        hint = f"; the nearest flag is {nearest[0]}" if nearest else ""
        self.exit(2, f"{self.prog}: error: {inert(message)}{hint} (--help lists all flags)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `argparse` has it, with the words of the file in front.

        Raises:
            ValueError: the file cannot be read, or a key or a value in it is wrong; one line.
        """
        self._add_opposites()
        words = list(sys.argv[1:] if args is None else args)
        first = argparse.ArgumentParser(add_help=False)
        first.add_argument("--config", nargs="?")  # the full parser says that its value is missing
        path = first.parse_known_args(words)[0].config
        foreign: list[str] | None = [] if self._passes_over else None
        if path is not None:
            words = [*words_of_file(self, path, given=words, foreign=foreign), *words]
        parsed, unknown = super().parse_known_args(words, namespace)
        parsed.resolved = resolved(self, parsed)
        if foreign is not None:
            training = _flags_of(add_run_arguments)
            parsed.passed_over = [key for key in foreign if key.replace("-", "_") not in training]
        return parsed, unknown

    def _add_opposites(self) -> None:
        """For each switch that a file may turn on, what turns it off again: `--no-verbose`, and `--checks` of `--no-checks`."""
        for action in list(self._actions):
            if not isinstance(action, argparse._StoreTrueAction):
                continue
            name = action.option_strings[0]
            opposite = name.replace("--no-", "--", 1) if name.startswith("--no-") else name.replace("--", "--no-", 1)
            if opposite not in self._option_string_actions:
                self.add_argument(opposite, dest=action.dest, action="store_false", default=argparse.SUPPRESS,
                                  help=argparse.SUPPRESS)  # fmt: skip


def check_parser(args: argparse.Namespace) -> None:
    """Refuse flags of a plain `ArgumentParser` before anything is loaded: a run writes what `RunParser` resolved.

    Raises:
        TypeError: they are.
    """
    if "resolved" not in args:
        raise TypeError("the flags have to come from a ludic.config_file.RunParser, not from a plain ArgumentParser")


def words_of_file(
    parser: argparse.ArgumentParser, path: str, *, given: Sequence[str] = (), foreign: list[str] | None = None
) -> list[str]:
    """The flags in the file, as words of a command line; without those that may be repeated, where `given` has them.

    Keys that are no flags of the parser are added to `foreign`, or refused where that is None.

    Raises:
        ValueError: the file cannot be read, or a key or a value in it is wrong; one line with the file.
    """
    import tomllib

    try:
        content = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML, with line and column
        raise ValueError(f"--config {path} is not TOML: {error}") from error
    actions, words, keys = settable(parser), list[str](), dict[str, str]()
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in actions:
            if foreign is not None and name not in NOT_IN_A_FILE and not isinstance(value, dict):
                foreign.append(key)
                continue
            raise ValueError(f"{path}: {_why_unknown(key, name, value, actions)}")
        action = actions[name]
        if action.dest in keys:
            raise ValueError(f"{path}: {keys[action.dest]} and {key} are the same flag: leave out one of them")
        keys[action.dest] = key
        if not _fits(action, value):
            raise ValueError(f"{path}: {key} = {_as_toml(value)}, but it has to be {_expected(action)}")
        if not (_is_repeated(action) and _is_given(action, given)):
            words += _words(action, value)
    return words


def settable(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags that a file may hold, by each of their long names."""
    return {
        name.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        if action.dest not in (*_NO_FLAGS, *NOT_IN_A_FILE) and action.help != argparse.SUPPRESS
        for name in action.option_strings
        if name.startswith("--") and not (_has_opposite(action) and name.startswith("--no-"))
    }


def resolved(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, dict[str, Value]]:
    """The value of each flag that has one, by the titles of the groups and the names that a file may use."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(GRPOConfig)}  # absent where not given
    allowed = {id(action): name for name, action in reversed(settable(parser).items())}  # the first of several names
    values: dict[str, dict[str, Value]] = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            value = vars(args).get(action.dest, defaults.get(action.dest))
            if value is None and action.type is number_or_auto:
                value = "auto"
            if value is not None and id(action) in allowed:
                values.setdefault(group.title or "", {})[allowed[id(action)]] = value
    return values


def write_config(path: Path, groups: Mapping[str, Mapping[str, Value]], *, command: str) -> None:
    """Write what `RunParser` resolved so that `--config` takes it, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    import tomli_w

    lines = [f"# ludic {installed_versions().get('ludic', '')}: {inert(command, limit=2_000)}"]
    for title, values in groups.items():
        lines += ["", f"# {title}"]
        for key, value in values.items():
            if not _is_unicode("".join(value) if isinstance(value, list) else str(value)):
                lines.append(f"# {key}: {inert(str(value))} is not Unicode, so it cannot stand here: give the flag")
            else:
                lines.append(tomli_w.dumps({key: value}).rstrip("\n"))
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _why_unknown(key: str, name: str, value: object, known: Iterable[str]) -> str:
    if isinstance(value, dict):
        return f"there are no tables in this file, so write the keys of [{inert(key)}] at the top"
    if name in NOT_IN_A_FILE:
        return f"{key} says what to do now: give --{name.replace('_', '-')} on the command line"
    for other, add in (("the training", add_run_arguments), ("the evaluation", _add_evaluation)):
        if name in _flags_of(add):
            return f"{key} is a flag of {other}, not of this command"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    near = f"the nearest is {nearest[0]}" if nearest else "the keys are the long names of the flags that --help lists"
    return f"there is no flag {inert(key)}: {near}"


def _flags_of(add: Callable[[argparse.ArgumentParser], None]) -> Iterable[str]:
    parser = argparse.ArgumentParser()
    add(parser)
    return settable(parser)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    add_evaluation_arguments(parser, out="")


def _is_switch(action: argparse.Action) -> bool:
    return action.nargs == 0


def _has_opposite(action: argparse.Action) -> bool:
    return isinstance(action, argparse.BooleanOptionalAction)


def _is_repeated(action: argparse.Action) -> bool:
    return isinstance(action, argparse._AppendAction)


def _is_given(action: argparse.Action, words: Sequence[str]) -> bool:
    """Whether a command line has the flag, in full or abbreviated."""
    hidden = argparse.ArgumentParser(add_help=False)
    hidden.add_argument(*action.option_strings, dest="given", nargs="*")
    return hidden.parse_known_args(words)[0].given is not None


def _fits(action: argparse.Action, value: object) -> bool:
    """Whether the flag takes this value of a TOML file. A number in quotes does not fit."""
    if _is_repeated(action):
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    if _is_switch(action) or isinstance(value, bool):
        return _is_switch(action) and isinstance(value, bool)
    if not isinstance(value, (str, int, float)):  # an array, a date
        return False
    convert: Any = action.type or str
    if not isinstance(value, _TOML_TYPES.get(convert, (str, int, float))):
        return False
    try:
        converted = convert(str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return action.choices is None or converted in action.choices


def _as_toml(value: object) -> str:
    return inert(json.dumps(value, ensure_ascii=False, default=str))  # for texts, numbers and arrays JSON is TOML


def _expected(action: argparse.Action) -> str:
    if _is_repeated(action):
        return "an array of strings"
    if _is_switch(action):
        return "true or false"
    if action.choices is not None:
        return "one of " + ", ".join(f'"{choice}"' for choice in action.choices)
    return _EXPECTED.get(action.type or str, f"a value that {action.option_strings[0]} takes")


def _words(action: argparse.Action, value: Value) -> list[str]:
    if isinstance(value, list):
        return [f"{action.option_strings[0]}={one}" for one in value]
    if not _is_switch(action):
        return [f"{action.option_strings[0]}={value}"]
    if value:
        return [action.option_strings[0]]
    return [name for name in action.option_strings if _has_opposite(action) and name.startswith("--no-")]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a path whose bytes are not UTF-8
        return False
    return True

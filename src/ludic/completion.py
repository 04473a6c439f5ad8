"""`--print-completion bash`: a script that completes a command's flags, their choices and their paths in a shell.

shtab writes the completion of one command word. ludic's commands are typed behind others (`uv run python
examples/gsm8k/train_gsm8k.py`, `python -m ludic.report`), where a shell asks for the completion of `uv` or `python`: for bash
and zsh a dispatcher is added, which looks for the command on the line. tcsh has no functions; there only an alias completes.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")

PATHS = {
    **dict.fromkeys(("FILE", "PATH", "RUN", "A", "B"), "file"),
    **dict.fromkeys(("DIR", "FOLDER", "MODEL", "CHECKPOINT"), "directory"),
}
"""What a flag takes, by the name that --help shows for it: a file, which may be in a folder, or a folder."""

_BASH = r"""
# Behind other words: `python -m ludic.report`, `uv run python examples/gsm8k/train_gsm8k.py`.
declare -gA _ludic_commands _ludic_earlier
_ludic_commands[@NAME@]=_shtab_@FUNCTION@
_ludic_dispatch() {
  local i earlier=${_ludic_earlier[$1]-}
  for ((i = 1; i < COMP_CWORD; i++)); do
    local word=${COMP_WORDS[i]##*/}  # a word that ends in / leaves none, which is no subscript
    local function=${_ludic_commands[${word:-/}]-}
    [[ -n $function ]] || continue
    local -a words=("${COMP_WORDS[@]:i}")
    local -a COMP_WORDS=("${words[@]}")
    local COMP_CWORD=$((COMP_CWORD - i))
    "$function"
    return
  done
  COMPREPLY=()
  if [[ -n $earlier ]]; then "$earlier" "$@"; else compopt -o default; fi
}
for _ludic_word in python python3 uv; do
  if [[ $(complete -p "$_ludic_word" 2>/dev/null) =~ -F\ ([^ ]+) && ${BASH_REMATCH[1]} != _ludic_dispatch ]]; then
    _ludic_earlier[$_ludic_word]=${BASH_REMATCH[1]}
  fi
  complete -o bashdefault -F _ludic_dispatch "$_ludic_word"
done
unset _ludic_word
"""

_ZSH = r"""
# Behind other words: `python -m ludic.report`, `uv run python examples/gsm8k/train_gsm8k.py`.
typeset -gA _ludic_commands _ludic_earlier
_ludic_commands[@NAME@]=_shtab_@FUNCTION@
_ludic_dispatch() {
  local i function earlier=${_ludic_earlier[$service]-}
  for ((i = 2; i < CURRENT; i++)); do
    function=${_ludic_commands[${words[i]:t}]-}
    [[ -n $function ]] || continue
    words=("${(@)words[i,-1]}")
    (( CURRENT -= i - 1 ))
    $function
    return
  done
  if [[ -n $earlier ]]; then $earlier "$@"; else _files; fi
}
for _ludic_word in python python3 uv; do
  if [[ ${_comps[$_ludic_word]-} != (|_ludic_dispatch) ]]; then _ludic_earlier[$_ludic_word]=${_comps[$_ludic_word]}; fi
  compdef _ludic_dispatch $_ludic_word
done
unset _ludic_word
"""

_DISPATCHERS = {"bash": _BASH, "zsh": _ZSH, "tcsh": ""}


def add_completion_argument(parser: argparse.ArgumentParser) -> None:
    """`--print-completion SHELL`, which prints the script and ends the program."""
    parser.add_argument("--print-completion", action=_Print, choices=SHELLS, default=argparse.SUPPRESS,
                        help="print the script that completes this command in that shell, and exit")  # fmt: skip


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes the command of `parser` in `shell`, one of `SHELLS`."""
    import shtab  # a tenth of a second, which --help does not need

    for action in parser._actions:
        shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if action.nargs != 0 and shown in PATHS:
            action.complete = shtab.CHOICE_FUNCTIONS[PATHS[shown]]  # type: ignore[attr-defined]
    name = parser.prog = command_word(parser)
    dispatcher = _DISPATCHERS[shell].replace("@NAME@", name).replace("@FUNCTION@", shtab.wordify(name))
    return f"{shtab.complete(parser, shell)}\n{dispatcher}"


def command_word(parser: argparse.ArgumentParser) -> str:
    """The word by which a line is known to be this command: `train_gsm8k.py`, `ludic.report`."""
    return parser.prog.split()[-1]


class _Print(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        sys.stdout.write(completion(parser, str(values)))
        parser.exit()

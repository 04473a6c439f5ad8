"""A training run of several processes that `torchrun` started: what each of them does with the flags.

Rank 0 runs the whole of `ludic.run.training`, with its engine, its files and its log. The others load the same model, and then
do as rank 0's learner says; they write nothing and say nothing. All are given the same flags, which is checked first.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ludic.cli import USER_ERRORS, say
from ludic.config import GRPOConfig, RunPaths
from ludic.doctor.machine import installed
from ludic.run.policy import load_models
from ludic.storage.identity import process_started
from ludic.survival.signals import SIGNALS, leave

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ludic.train.rank_learner import RankLearner
    from ludic.train.ranks import Ranks

LAUNCH_FILE = ".torchrun"
"""Says which torchrun the files of a run are of, so that a restart of its processes can tell them from an earlier run's."""


_EXPERTS = r"^(moe_)?(num|n)_(local_|routed_)?experts$"


class Start(NamedTuple):
    """What rank 0 tells the others once it has checked and found everything."""

    model: str
    """Its files."""
    checkpoint: Path | None
    config: GRPOConfig


def launched_ranks() -> int:
    """How many processes torchrun started for this run; 1 where it did not start this one."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() and "RANK" in os.environ else 1


def check_rank_arguments(args: argparse.Namespace, config: GRPOConfig) -> None:
    """Refuse flags that need one process, or several.

    Raises:
        ValueError: one line with the flag.
    """
    ranks = launched_ranks()
    if ranks == 1:
        for flag, given in (("--cpu-offload", config.cpu_offload), ("--shard-weights", config.shard_weights)):
            if given:
                raise ValueError(
                    f"{flag} is for several ranks: start them with torchrun --nproc_per_node N, or leave it out"
                )
        return
    if args.start_server:
        raise ValueError(
            f"--start-server would give the server a GPU that one of the {ranks} ranks trains on: start the server by itself, "
            "with CUDA_VISIBLE_DEVICES, and leave the flag out"
        )
    if args.forecast:
        raise ValueError(f"--forecast measures one process, not {ranks} ranks: start it without torchrun")
    from ludic.train.rank_learner import check_settings

    check_settings(config, ranks)


def check_architecture(name: str, model: "PretrainedConfig") -> None:
    """Refuse a mixture of experts on several ranks, if its configuration says that it is one.

    Each rank's tokens choose other experts. Code that loops over those that were chosen would make the ranks gather other
    weights, and wait for each other for ever.

    Raises:
        ValueError: one line.
    """
    ranks = launched_ranks()
    if ranks > 1 and (setting := _experts(model.to_dict())) is not None:
        raise ValueError(
            f"{name} is a mixture of experts ({setting}), which {ranks} ranks cannot train: take a dense model, or start it "
            "without torchrun"
        )


def _experts(settings: Mapping[Any, Any]) -> str | None:
    """The setting, also of a part of the model, that gives it several experts, with its value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            if (inside := _experts(value)) is not None:
                return inside
        elif re.search(_EXPERTS, str(name)) and isinstance(value, int | list) and value not in (0, 1, []):
            return f"{name} {value}"
    return None


@contextlib.contextmanager
def joined_ranks(args: argparse.Namespace) -> "Iterator[Ranks | None]":
    """This process among those of the run; None where it is the only one. What the block raises ends all of them.

    Raises:
        ValueError: the ranks were given different flags, or have different packages; the first difference is named.
    """
    if launched_ranks() == 1:
        yield None
        return
    from ludic.train.ranks import Ranks

    if os.environ["RANK"] != "0":
        for number in SIGNALS:  # rank 0 has them too: it ends in good order, for which it needs the others
            signal.signal(number, signal.SIG_IGN)
    ranks, own_errors = Ranks(leave=_leave), sys.stderr
    try:
        if ranks.rank and not os.environ.get("LUDIC_TRACEBACK"):  # rank 0 says what there is to say
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  it stays until the process ends
        given = ranks.share(_what_must_agree(args))
        if ranks.rank == 0:  # all would find the same; the others hear of it as of any failure of rank 0
            check_same(given)
        yield ranks
        if ranks.rank == 0:
            ranks.tell([("end", ())] * ranks.size)
            ranks.leave_groups()
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            if ranks.rank:  # it was told that this was all
                ranks.leave_groups()
            raise
        cause = ranks.explained(error)
        if ranks.rank:
            if cause is error and not isinstance(error, USER_ERRORS):  # a bug, whose trace is on this rank alone
                traceback.print_exception(error, file=own_errors)
            own_errors.write(_last_words(str(cause)))
            ranks.await_the_word_of_rank_0()
        if cause is error:
            raise
        raise cause from error
    finally:
        ranks.close()


def _leave(failure: str) -> None:
    """End this process, whose main thread may be stuck in a collective for ever."""
    leave(2, _last_words(failure))


def _last_words(failure: str) -> str:
    """What this rank says of what ended all of them: rank 0 speaks, where there is one."""
    rank = int(os.environ["RANK"])
    speaks = rank == 0 or (rank == 1 and failure.startswith(("rank 0 was lost", "torchrun's store")))
    return f"{Path(sys.argv[0]).name}: error: {failure}\n" if speaks else ""


def _what_must_agree(args: argparse.Namespace) -> dict[str, str]:
    """Of one rank: its flags and versions, as texts by name."""
    flags = {f"--{name.replace('_', '-')}": repr(value) for name, value in vars(args).items() if name != "resolved"}
    versions = {name: str(installed(name)) for name in ("ludic", "torch", "transformers")}
    return {**flags, "Python": platform.python_version(), **versions}


def check_same(ranks: list[Mapping[str, str]]) -> None:
    """Refuse ranks of which one has another flag or version than rank 0.

    Raises:
        ValueError: names the first difference.

    Example:
        >>> check_same([{"--seed": "1"}, {"--seed": "2"}])
        Traceback (most recent call last):
        ValueError: --seed is 1 on rank 0 and 2 on rank 1: start all ranks with the same flags and packages
    """
    first = ranks[0]
    for rank, other in enumerate(ranks):
        for name in sorted(first.keys() | other.keys()):
            ours, theirs = first.get(name, "not given"), other.get(name, "not given")
            if ours != theirs:
                raise ValueError(
                    f"{name} is {ours} on rank 0 and {theirs} on rank {rank}: "
                    "start all ranks with the same flags and packages"
                )


def follow(ranks: "Ranks", args: argparse.Namespace) -> None:
    """The whole run of every rank but the first."""
    name, start = ranks.told()
    if name == "end":
        return
    assert isinstance(start, Start)
    args.model = start.model
    policy, _, reference = load_models(args, start.config, start.checkpoint, "cpu")
    make_learner(ranks, start, policy, reference).follow()


def start_learner(
    ranks: "Ranks", start: Start, policy: "PreTrainedModel", reference: "PreTrainedModel | None"
) -> "RankLearner":
    """Rank 0's learner, after it has told the others to make theirs."""
    ranks.tell([("start", start)] * ranks.size)
    return make_learner(ranks, start, policy, reference)


def make_learner(
    ranks: "Ranks", start: Start, policy: "PreTrainedModel", reference: "PreTrainedModel | None"
) -> "RankLearner":
    """This rank's learner; that of a resumed run has its part of the optimizer's state.

    Raises:
        ValueError: the ranks have loaded different weights.
    """
    from ludic.train.checkpoint import training_folder
    from ludic.train.replicated import ReplicatedLearner
    from ludic.train.sharded import ShardedLearner

    check_same(ranks.share(_fingerprint(policy)))
    kind = ShardedLearner if start.config.shards_weights else ReplicatedLearner
    learner = kind(start.config, policy, ranks=ranks, reference_model=reference)
    if start.checkpoint is not None and ranks.rank:  # rank 0's trainer does so itself
        learner.resume(training_folder(start.checkpoint))
    return learner


def _fingerprint(model: "PreTrainedModel") -> dict[str, str]:
    """A sum of each parameter's bits: nodes may have another version of a model of the same name, and other CPUs."""
    from ludic.train.fingerprint import bit_sums

    return {name: str(number) for name, number in bit_sums(model).items()}


# -- restarts of torchrun ------------------------------------------------------------------------------------------------


def resume_after_restart(args: argparse.Namespace, paths: RunPaths) -> None:
    """After `torchrun --max-restarts` has started the processes again, go on from the last checkpoint of this very run."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not _is_of_this_launch(paths.out_dir):
        return
    from ludic.train.checkpoint import list_checkpoints

    if list_checkpoints(paths.checkpoints):
        say(f"torchrun has started this run again ({os.environ['TORCHELASTIC_RESTART_COUNT']}): continuing it")
        args.resume = "latest"


def note_launch(out_dir: Path) -> None:
    """Write down that the files in `out_dir` are from now on those of this torchrun's run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        (out_dir / LAUNCH_FILE).write_text(json.dumps(_launch()) + "\n")


def _is_of_this_launch(out_dir: Path) -> bool:
    try:
        return bool(json.loads((out_dir / LAUNCH_FILE).read_text()) == _launch())
    except (OSError, ValueError):
        return False


def _launch() -> str:
    """Which torchrun this is: by its run's name, where it has one, which the agents of all nodes share."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name if name not in ("", "none") else f"process {os.getppid()}, {process_started(os.getppid())}"

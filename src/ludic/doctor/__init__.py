"""`python -m ludic.doctor`: in under a minute, before money is spent, what would keep a training run from working.

It takes the flags of the training script and says one line a check: ok, warning or failed, with the fix. It starts no
server; with --start-server it looks at what one would need. Left out: whether a run will learn, which `telemetry.alarms`
watches for.
"""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ludic.config import GRPOConfig
from ludic.doctor.dry_run import check_token_ids
from ludic.doctor.findings import Finding, run_checks
from ludic.doctor.machine import quick_local_checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Finding", "check_token_ids", "quick_checks"]


def quick_checks(
    args: argparse.Namespace, config: GRPOConfig, tokenizer: "PreTrainedTokenizerBase", *, num_checkpoints: int = 0
) -> Iterator[Finding]:
    """What every training run looks at before it loads its model: versions, GPUs, memory, disk, and a dry run of an update
    and a checkpoint. A resumed run has `num_checkpoints` already."""
    return run_checks(quick_local_checks(args, config, lambda: tokenizer, num_checkpoints=num_checkpoints))

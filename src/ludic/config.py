"""Every setting of a GRPO run, in one frozen dataclass that is checked as it is made.

The field's help text is the `--help` of the training script: `add_arguments` writes it out and `from_arguments` reads it
back, so a setting is described in one place. Flags of the task, the model and the engine belong to the script.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
Schedule = Literal["constant", "linear", "cosine"]
LOSS_NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
"""The names in `ludic.train.losses.LOSSES`, without the seconds that its import takes: --help has to be quick."""


def _setting(default: Any, group: str, help_text: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"group": group, "help": help_text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """Settings of `GRPOTrainer`. Lengths and budgets are in tokens.

    Raises:
        ValueError: a value is out of range, or two of them contradict each other; the message names the flag.
    """

    rollouts_per_update: int = _setting(
        256, "rollouts", "completions sampled for one update; a multiple of --group-size"
    )
    group_size: int = _setting(8, "rollouts", "completions of each prompt, compared with one another (G)")
    temperature: float = _setting(1.0, "rollouts", "sampling temperature; the trainer divides its logits by the same")
    max_seq_len: int = _setting(
        1024, "rollouts", "tokens of prompt and completion together; completions are capped to fit"
    )
    max_completion_len: int = _setting(
        0, "rollouts", "cap on a completion's tokens; 0: as many as --max-seq-len leaves"
    )

    max_staleness: int = _setting(
        0,
        "rollouts",
        "how many updates older than the policy rollouts may be; 0: on-policy, 1: generate ahead (resumed, the first is fresh)",
    )
    logprob_share: float = _setting(
        0.0625,
        "rollouts",
        "share of groups whose sampler log-probs are asked for, to compare; all where they correct (--tis-cap, --max-staleness)",
    )

    train_steps: int = _setting(100, "optimisation", "updates in this run")
    loss: str = _setting(
        "dapo",
        "optimisation",
        "policy loss; dapo is the token mean; with one epoch an update gspo is grpo and cispo is dapo",
        choices=LOSS_NAMES,
    )
    learning_rate: float = _setting(1e-6, "optimisation", "peak learning rate of AdamW")
    lr_schedule: Schedule = _setting(
        "constant", "optimisation", "after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = _setting(5, "optimisation", "updates over which the learning rate rises to its peak")
    weight_decay: float = _setting(0.0, "optimisation", "AdamW's decoupled weight decay; norms and biases are left out")
    adam_beta1: float = _setting(0.9, "optimisation", "AdamW's decay of the first moment")
    adam_beta2: float = _setting(0.99, "optimisation", "AdamW's decay of the second moment")
    max_grad_norm: float = _setting(1.0, "optimisation", "gradients are clipped to this norm; 0 switches it off")
    epochs_per_update: int = _setting(
        1, "optimisation", "optimizer steps on the same rollouts; above 1 the clipping acts"
    )
    clip_low: float | None = _setting(None, "optimisation", "clip the ratio at 1 - this; default: the loss's own paper")
    clip_high: float | None = _setting(
        None, "optimisation", "clip the ratio at 1 + this; default: the loss's own paper"
    )
    kl_coef: float = _setting(
        0.0, "optimisation", "weight of the KL penalty to the initial policy; 0: no reference model"
    )
    tis_cap: float | None = _setting(
        None, "optimisation", "cap of the truncated importance weight; default: 2 with --max-staleness, else 0 (off)"
    )
    mask_truncated: bool = _setting(False, "optimisation", "leave truncated completions out of the loss")
    scale_rewards: bool | None = _setting(
        None, "optimisation", "divide advantages by the group's standard deviation; default: yes, but not for dr_grpo"
    )

    micro_token_budget: int | None = _setting(
        16384, "memory", "tokens of one micro-batch, the knob for the trainer's memory; auto: as many as fit"
    )
    share_prompts: bool = _setting(True, "memory", "forward a prompt once for all its completions in a micro-batch")
    gradient_checkpointing: bool = _setting(
        False, "memory", "recompute activations in the backward pass: slower, smaller"
    )
    compile: bool = _setting(
        True, "memory", "on CUDA: compile layers and log-probs; quicker, but some 20 s more at the first update"
    )
    fp32_head: bool = _setting(
        False, "memory", "keep logits in fp32 here and on a server that is started; else both sides round them to bf16"
    )
    logprob_chunk: int = _setting(4096, "memory", "tokens that meet the vocabulary at once; bounds the logits' memory")

    eval_every: int = _setting(0, "evaluation", "evaluate every N updates; 0: only before and after training")
    eval_limit: int = _setting(200, "evaluation", "problems of one evaluation; 0 switches evaluation off")
    eval_temperature: float = _setting(0.0, "evaluation", "temperature of the evaluation; 0 is greedy")

    save_every: int = _setting(
        50, "checkpoints", "write a checkpoint every N updates and at the end; 0: only at the end"
    )
    keep_checkpoints: int = _setting(2, "checkpoints", "how many of the last checkpoints stay")
    seed: int = _setting(0, "reproducibility", "every other seed derives from (seed, step, prompt, member)")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, choices = getattr(self, setting.name), setting.metadata["choices"]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{_flag(setting.name)} must be a finite number, not {value}")
            if choices and value not in choices:
                raise ValueError(f"{_flag(setting.name)} {value} is not one of {', '.join(choices)}")
        for name in ("rollouts_per_update", "max_seq_len", "train_steps", "epochs_per_update", "logprob_chunk",
                     "keep_checkpoints"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, not {getattr(self, name)}")
        for name in ("max_completion_len", "max_staleness", "warmup_steps", "weight_decay", "max_grad_norm", "kl_coef",
                     "tis_cap", "eval_every", "eval_limit", "eval_temperature", "save_every"):  # fmt: skip
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{_flag(name)} must not be negative, but is {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(
                f"--group-size must be at least 2, not {self.group_size}: GRPO compares completions of one prompt"
            )
        if self.rollouts_per_update % self.group_size:
            raise ValueError(
                f"--rollouts-per-update {self.rollouts_per_update} is not a multiple of --group-size {self.group_size}"
            )
        if not 0 <= self.logprob_share <= 1:
            raise ValueError(f"--logprob-share must be in 0 to 1, not {self.logprob_share}")
        if self.micro_token_budget is not None and self.micro_token_budget < 1:
            raise ValueError(f"--micro-token-budget must be at least 1, or auto, not {self.micro_token_budget}")
        if self.micro_token_budget is not None and self.micro_token_budget < self.max_seq_len:
            raise ValueError(
                f"--micro-token-budget {self.micro_token_budget} is smaller than --max-seq-len {self.max_seq_len}: "
                "no sequence is split, so the budget must hold the longest one"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"--temperature must be above 0 for training, not {self.temperature}: greedy groups are all alike"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"--learning-rate must be above 0, not {self.learning_rate}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ValueError(f"--clip-low must be in 0 to 1 (1 is no lower clip), not {self.clip_low}")
        if self.clip_high is not None and self.clip_high < 0:
            raise ValueError(f"--clip-high must not be negative, but is {self.clip_high}")
        if self.max_completion_len >= self.max_seq_len:
            raise ValueError(
                f"--max-completion-len {self.max_completion_len} leaves no room for a prompt in --max-seq-len {self.max_seq_len}"
            )

    @property
    def groups_per_update(self) -> int:
        return self.rollouts_per_update // self.group_size

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that is accepted: one token of `max_seq_len` at least is left for the completion."""
        return self.max_seq_len - 1

    @property
    def importance_cap(self) -> float | None:
        """The cap of the truncated importance weight, None for no correction.

        Strictly on-policy rollouts are sampled by the policy that trains, so the ratio needs no correction, and the server
        need not return log-probs, which cost it more than anything else. Stale ones are corrected.
        """
        if self.tis_cap is None:
            return 2.0 if self.max_staleness else None
        return self.tis_cap or None

    def wants_logprobs(self, group_id: int) -> bool:
        """Whether the engine is asked for the log-probs of this group: all where they correct, else a share to watch."""
        if self.importance_cap is not None:
            return True
        groups = self.groups_per_update
        chosen, place = math.ceil(groups * self.logprob_share), group_id % groups
        return (place + 1) * chosen // groups > place * chosen // groups  # as many of each update, evenly spread

    def completion_cap(self, prompt_len: int) -> int:
        """How many tokens a completion of such a prompt may have."""
        room = self.max_seq_len - prompt_len
        return min(room, self.max_completion_len) if self.max_completion_len else room


_SHORT_NAMES = {"learning_rate": "--lr", "max_completion_len": "--max-tokens"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting, in the groups of the dataclass. Flags that are not given are absent from the namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in dataclasses.fields(GRPOConfig):
        group = setting.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        kind = str(setting.type)
        shown = "" if setting.default is None else f" (default: {setting.default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": setting.metadata["help"] + shown}
        names = [_flag(setting.name)]
        if setting.name in _SHORT_NAMES:
            names.append(_SHORT_NAMES[setting.name])
        if "bool" in kind:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = number_or_auto if setting.name == "micro_token_budget" else _kind(kind)
            if setting.metadata["choices"]:
                options["choices"] = setting.metadata["choices"]
            else:
                options["metavar"] = "N" if "int" in kind else "X"
        groups[group].add_argument(*names, dest=setting.name, **options)


def _kind(annotation: str) -> type[int] | type[float] | type[str]:
    if "int" in annotation:
        return int
    return float if "float" in annotation else str


def number_or_auto(text: str) -> int | None:
    """A number of tokens; `auto` is None."""
    return None if text == "auto" else int(text)


def from_arguments(namespace: argparse.Namespace) -> GRPOConfig:
    """The settings that were given, over the dataclass's own defaults."""
    names = {setting.name for setting in dataclasses.fields(GRPOConfig)}
    return GRPOConfig(**{name: value for name, value in vars(namespace).items() if name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPaths:
    """The files that a training run writes, all in one folder."""

    out_dir: Path
    name: str = "gsm8k"

    @property
    def rollouts(self) -> Path:
        return self.out_dir / f"{self.name}_train_rollouts.jsonl"

    @property
    def prompt(self) -> Path:
        return self.out_dir / f"{self.name}_train_prompt.json"

    @property
    def metrics(self) -> Path:
        return self.out_dir / f"{self.name}_train_metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.out_dir / f"{self.name}_train_summary.json"

    @property
    def checkpoints(self) -> Path:
        return self.out_dir / f"checkpoints_{self.name}"

    @property
    def curve(self) -> Path:
        return self.out_dir / f"{self.name}_train_reward.png"

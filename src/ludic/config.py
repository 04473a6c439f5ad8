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

from ludic.config_checks import check_settings, flag_of

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
Schedule = Literal["constant", "linear", "cosine"]
ALL_LINEAR = "all-linear"
"""`lora_target` for every linear layer but the output layer."""
LOSS_NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
"""The names in `ludic.train.losses.LOSSES`, without the seconds that its import takes: --help has to be quick."""
Normalisation = Literal["token_mean", "sequence_mean", "prompt_mean", "constant"]
"""What a token's loss is divided by; see `ludic.train.packing`."""
RatioTo = Literal["update", "sampler"]
ImportanceMask = Literal["none", "token", "sequence", "geometric"]
MASK_BOUNDS: dict[ImportanceMask, tuple[float, float]] = {
    "none": (0.0, math.inf),
    "token": (0.5, 5.0),  # IcePop's own, arXiv 2510.18855
    "sequence": (0.0, 2.0),
    "geometric": (0.99, 1.01),
}
"""The band outside of which each mask masks, unless another is given; see `ludic.train.corrections`."""


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
    record_token_logprobs: bool = _setting(
        False,
        "rollouts",
        "record these log-probs for each token, and the trainer's gap to them: the report page shades texts by both",
    )

    dynamic_sampling: bool = _setting(
        False,
        "prompts",
        "replace groups whose rewards are all alike by further prompts, until the update is full (DAPO)",
    )
    max_sampling_factor: int = _setting(
        8, "prompts", "with --dynamic-sampling: at most this many times an update's groups are generated for it"
    )
    drop_solved: int = _setting(
        0, "prompts", "leave out prompts whose last N groups were all correct, but for one visit in 16; 0: none"
    )
    curriculum: bool = _setting(
        False,
        "prompts",
        "prefer prompts solved half the time: taken with a chance of 4p(1-p), p the running solve rate",
    )

    train_steps: int = _setting(100, "optimisation", "updates in this run")
    learning_rate: float = _setting(1e-6, "optimisation", "peak learning rate of AdamW")
    lr_schedule: Schedule = _setting(
        "constant", "optimisation", "after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = _setting(5, "optimisation", "updates over which the learning rate rises to its peak")
    weight_decay: float = _setting(0.0, "optimisation", "AdamW's decoupled weight decay; norms and biases are left out")
    adam_beta1: float = _setting(0.9, "optimisation", "AdamW's decay of the first moment")
    adam_beta2: float = _setting(0.99, "optimisation", "AdamW's decay of the second moment")
    max_grad_norm: float = _setting(1.0, "optimisation", "gradients are clipped to this norm; 0 switches it off")
    epochs_per_update: int = _setting(1, "optimisation", "passes over the same rollouts; above 1 the clipping acts")
    mini_batches: int = _setting(
        1,
        "optimisation",
        "optimizer steps of one pass, on disjoint parts of the update's groups; above 1 the clipping acts",
    )

    loss: str = _setting(
        "dapo",
        "loss",
        "policy loss; dapo is the token mean; with one step an update and --ratio-to update gspo is grpo, cispo is dapo",
        choices=LOSS_NAMES,
    )
    ratio_to: RatioTo = _setting(
        "update",
        "loss",
        "the loss's ratio is to the policy at the start of the update, or to the sampler (its recorded log-probs)",
        choices=("update", "sampler"),
    )
    clip_low: float | None = _setting(None, "loss", "clip the ratio at 1 - this; default: the loss's own paper")
    clip_high: float | None = _setting(None, "loss", "clip the ratio at 1 + this; default: the loss's own paper")
    dual_clip: float = _setting(
        0.0, "loss", "bound the loss at this times |advantage| where that is negative, 3 say; 0 switches it off"
    )
    normalisation: Normalisation | None = _setting(
        None,
        "loss",
        "what a token's loss is divided by; default: the loss's own paper",
        choices=("token_mean", "sequence_mean", "prompt_mean", "constant"),
    )
    kl_coef: float = _setting(0.0, "loss", "weight of the KL penalty to the initial policy; 0: no reference model")
    mask_truncated: bool = _setting(False, "loss", "leave truncated completions out of the loss")
    overlong_buffer: int = _setting(
        0,
        "loss",
        "last N tokens before --max-tokens, which it needs, over which the reward falls by up to 1 (DAPO); 0 switches it off",
    )
    baseline: Literal["mean", "leave_one_out"] = _setting(
        "mean",
        "loss",
        "a reward is compared with the mean of its group, or of the others in it (RLOO)",
        choices=("mean", "leave_one_out"),
    )
    scale_rewards: bool | None = _setting(
        None,
        "loss",
        "divide advantages by a standard deviation; default: yes, but for dr_grpo or leave_one_out only with "
        "--advantage-std batch",
    )
    advantage_std: Literal["group", "batch"] = _setting(
        "group",
        "loss",
        "whose standard deviation that is: each group's own, or the update's",
        choices=("group", "batch"),
    )

    tis_cap: float | None = _setting(
        None,
        "correction",
        "cap of the truncated importance weight; default: 2 with --max-staleness, else 0 (off); off with the ratio to the "
        "sampler or a mask that weighs itself",
    )
    importance_mask: ImportanceMask = _setting(
        "none",
        "correction",
        "mask by old / rollout outside a band: tokens (IcePop), sequences (MIS), or sequences by the geometric mean",
        choices=("none", "token", "sequence", "geometric"),
    )
    mask_low: float | None = _setting(
        None, "correction", "lower end of the band; default: token 0.5, sequence 0, geometric 0.99"
    )
    mask_high: float | None = _setting(
        None, "correction", "upper end of the band; default: token 5, sequence 2, geometric 1.01"
    )

    lora_rank: int = _setting(
        0,
        "adapter",
        "train a LoRA adapter of this rank over the frozen model, at about 10 times the learning rate; 0: all weights",
    )
    lora_alpha: float = _setting(32.0, "adapter", "what the adapter adds is scaled by this over the rank")
    lora_target: str = _setting(
        ALL_LINEAR,
        "adapter",
        "names of the linear layers with an adapter, e.g. q_proj,v_proj; all-linear: all but the output layer",
    )
    lora_sync: Literal["merged", "adapter"] = _setting(
        "merged",
        "adapter",
        "what a weight sync sends: merged, the whole model; adapter, the adapter alone, to servers started with --enable-lora",
        choices=("merged", "adapter"),
    )

    micro_token_budget: int | None = _setting(
        16384, "memory", "tokens of one micro-batch, the knob for the trainer's memory; auto: as many as fit"
    )
    share_prompts: bool = _setting(True, "memory", "forward a prompt once for all its completions in a micro-batch")
    gradient_checkpointing: bool = _setting(
        False, "memory", "recompute activations in the backward pass: slower, smaller"
    )
    cpu_offload: bool = _setting(
        False,
        "memory",
        "with several ranks (torchrun): weights and AdamW's state in the hosts' memory; slower, smaller",
    )
    shard_weights: bool = _setting(
        False,
        "memory",
        "with several ranks (torchrun): each holds its part of weights and gradients too (FSDP); slower, smaller",
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
        check_settings(self)

    @property
    def sent_rank(self) -> int:
        """Of the adapter that weight syncs send; 0 where they send whole models."""
        return self.lora_rank if self.lora_sync == "adapter" else 0

    @property
    def groups_per_update(self) -> int:
        return self.rollouts_per_update // self.group_size

    @property
    def max_groups_per_update(self) -> int:
        """How many groups `dynamic_sampling` generates for one update at most."""
        return self.groups_per_update * self.max_sampling_factor

    @property
    def keeps_zero_variance(self) -> bool:
        """Whether groups without variance are trained on: for a KL penalty, which every sampled token owes."""
        return self.kl_coef > 0 and not self.dynamic_sampling

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that is accepted: one token of `max_seq_len` at least is left for the completion."""
        return self.max_seq_len - 1

    @property
    def shards_weights(self) -> bool:
        """Whether each of several ranks holds but a part of the weights."""
        return self.shard_weights or self.cpu_offload

    @property
    def importance_cap(self) -> float | None:
        """The cap of the truncated importance weight, None for no correction.

        Strictly on-policy rollouts are sampled by the policy that trains, so the ratio needs no correction, and the server
        need not return log-probs, which cost it more than anything else. Stale ones are corrected, once: where the ratio is to
        the sampler, or a mask carries the weight, this one is off.
        """
        if self.tis_cap is None:
            weighs_itself = self.ratio_to == "sampler" or self.importance_mask in ("token", "sequence")
            return 2.0 if self.max_staleness and not weighs_itself else None
        return self.tis_cap or None

    @property
    def mask_band(self) -> tuple[float, float]:
        """Lower and upper end of what `importance_mask` lets through."""
        low, high = MASK_BOUNDS[self.importance_mask]
        return low if self.mask_low is None else self.mask_low, high if self.mask_high is None else self.mask_high

    @property
    def needs_logprobs(self) -> bool:
        """Whether a sequence without the sampler's log-probs cannot be trained on."""
        return self.importance_cap is not None or self.importance_mask != "none" or self.ratio_to == "sampler"

    @property
    def scales_rewards(self) -> bool:
        """Whether advantages are divided by a standard deviation."""
        if self.scale_rewards is None:
            return self.advantage_std == "batch" or (self.loss != "dr_grpo" and self.baseline == "mean")
        return self.scale_rewards

    def wants_logprobs(self, slot: int) -> bool:
        """Whether the engine is asked for the log-probs of this group of an update: all where they correct, else a share to
        watch. `slot` counts an update's groups from 0; in plain sampling a `group_id` says the same."""
        if self.needs_logprobs:
            return True
        groups = self.groups_per_update
        chosen, place = math.ceil(groups * self.logprob_share), slot % groups
        return (place + 1) * chosen // groups > place * chosen // groups  # as many of each update, evenly spread

    def completion_cap(self, prompt_len: int) -> int:
        """How many tokens a completion of such a prompt may have."""
        room = self.max_seq_len - prompt_len
        return min(room, self.max_completion_len) if self.max_completion_len else room


_SHORT_NAMES = {"learning_rate": "--lr", "max_completion_len": "--max-tokens"}


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
        names = [flag_of(setting.name)]
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
    name: str
    """Begins the names of the files."""

    @property
    def rollouts(self) -> Path:
        return self.out_dir / f"{self.name}_train_rollouts.jsonl"

    @property
    def prompt(self) -> Path:
        return self.out_dir / f"{self.name}_train_prompt.json"

    @property
    def start(self) -> Path:
        return self.out_dir / f"{self.name}_train_start.json"

    @property
    def config(self) -> Path:
        return self.out_dir / f"{self.name}_train_config.toml"

    @property
    def metrics(self) -> Path:
        return self.out_dir / f"{self.name}_train_metrics.jsonl"

    @property
    def token_gaps(self) -> Path:
        return self.out_dir / f"{self.name}_train_token_gaps.jsonl"

    @property
    def grown(self) -> tuple[Path, ...]:
        """The JSON lines that every update adds to, each with its `step`."""
        return (self.metrics, self.rollouts, self.token_gaps)

    @property
    def summary(self) -> Path:
        return self.out_dir / f"{self.name}_train_summary.json"

    @property
    def forecast(self) -> Path:
        """Written by `--forecast`; a run leaves it where it is, and compares itself with it."""
        return self.out_dir / f"{self.name}_forecast.json"

    @property
    def checkpoints(self) -> Path:
        return self.out_dir / f"checkpoints_{self.name}"

    @property
    def curve(self) -> Path:
        return self.out_dir / f"{self.name}_train_reward.png"

    @property
    def report(self) -> Path:
        return self.out_dir / f"{self.name}_train_report.html"

    @property
    def tensorboard(self) -> Path:
        return self.out_dir / f"{self.name}_tensorboard"

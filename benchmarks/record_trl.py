"""TRL's GRPOTrainer in the place of ludic, in a record of `examples/gsm8k/record.py`: its warm-up, problems and settings.

    python benchmarks/record_trl.py --record OUT --seconds 100
    python examples/gsm8k/record.py --dataset DIR --out-dir OUT --phases score --also OUT/trl_seed_0/checkpoint-*
    python benchmarks/record_trl.py --record OUT --picture

The first line trains, on one GPU, with vLLM in TRL's own process (`vllm_mode="colocate"`), which is how TRL shares a GPU. The
second scores its checkpoints as ludic's are scored, by the same server. The third draws accuracy against rollouts and against
seconds, both sides in one picture: OUT/record_seed_N.png. Seconds are of the training alone, without the loading before it.

Left out: tuning of TRL. What `trl_grpo.py` found fastest is taken over where it applies (no gradient checkpointing, fused AdamW).
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GPU_SHARE = 0.3
"""Of the memory, for vLLM: as the record's server has it."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--record", required=True, type=Path, metavar="DIR", help="--out-dir of record.py, with its seed made"
    )
    parser.add_argument("--seed", type=int, default=0, help="which seed's settings (default: 0)")
    parser.add_argument("--seconds", type=float, help="stop after the update that crosses it (default: all updates)")
    parser.add_argument("--updates", type=int, help="at most (default: those of the record's settings)")
    parser.add_argument("--save-every", type=int, default=10, help="updates between checkpoints (default: 10)")
    parser.add_argument("--batch-size", type=int, default=64, help="per_device_train_batch_size (default: 64)")
    parser.add_argument("--picture", action="store_true", help="draw what was made, and train nothing")
    parser.add_argument("--cpu", action="store_true", help="train and generate on the CPU: to try the script")
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those that the record's GRPO was started with."""
    settings: dict[str, Any] = json.loads((seed_dir(args) / "gsm8k_train_start.json").read_text())["settings"]
    return settings


def seed_dir(args: argparse.Namespace) -> Path:
    return Path(args.record) / f"seed_{args.seed}"


def trl_dir(args: argparse.Namespace) -> Path:
    return Path(args.record) / f"trl_seed_{args.seed}"


# -- training ----------------------------------------------------------------------------------------------------------


def trl_settings(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """What TRL's GRPOConfig is given for ludic's settings."""
    rollouts, batch = settings["rollouts_per_update"], min(args.batch_size, settings["rollouts_per_update"])
    if rollouts % batch:
        raise ValueError(f"--batch-size {batch}: the record's {rollouts} rollouts are no multiple of it")
    return {
        "output_dir": str(trl_dir(args)),
        "max_steps": args.updates or settings["train_steps"],
        "seed": settings["seed"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["lr_schedule"],
        "warmup_steps": settings["warmup_steps"],
        "weight_decay": settings["weight_decay"],
        "adam_beta1": settings["adam_beta1"],
        "adam_beta2": settings["adam_beta2"],
        "max_grad_norm": settings["max_grad_norm"],
        "optim": "adamw_torch" if args.cpu else "adamw_torch_fused",
        "bf16": not args.cpu,
        "use_cpu": args.cpu,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": rollouts // batch,
        "num_generations": settings["group_size"],
        "max_completion_length": settings["max_completion_len"],
        "temperature": settings["temperature"],
        "loss_type": settings["loss"],
        "epsilon_high": 0.28,  # DAPO's own, which ludic takes by default
        "beta": settings["kl_coef"],
        "use_vllm": not args.cpu,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": GPU_SHARE,
        "vllm_max_model_length": settings["max_seq_len"],
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": args.save_every,
        "save_only_model": True,
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa", "device_map": None},
    }


def train(args: argparse.Namespace) -> None:
    """Train with TRL; a JSON line an update in trl.jsonl, model folders in checkpoint-N."""
    from benchmarks.peers.trl_shared import prepare_process, require_same_prompts, stop_printing

    prepare_process()
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from environments.gsm8k import GSM8K, load

    settings, started = settings_of(args), time.perf_counter()
    environment = GSM8K(system_prompt=settings["system_prompt"])
    samples = load("train", dataset=Path(args.record) / "grpo_problems.jsonl")
    rows = [
        {"prompt": [dict(turn) for turn in environment.messages(one)], "place": place}
        for place, one in enumerate(samples)
    ]
    dataset = Dataset(InMemoryTable.from_pylist(rows), fingerprint=f"record-{len(rows)}")
    warm_up = settings["model"]
    tokenizer = AutoTokenizer.from_pretrained(warm_up, padding_side="left")

    with asyncio.Runner() as runner:  # one loop for all calls: the grader's processes belong to it

        def reward(completions: Sequence[Any], place: Sequence[int], **_unused: object) -> list[float]:
            async def score() -> list[float]:
                texts = [turns[0]["content"] for turns in completions]
                pairs = zip(place, texts, strict=True)
                scores = await asyncio.gather(*(environment.score(samples[one], text) for one, text in pairs))
                return [score.reward for score in scores]

            return runner.run(score())

        trainer = GRPOTrainer(
            model=warm_up,
            reward_funcs=reward,
            args=GRPOConfig(**trl_settings(args, settings)),
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[_clock(trl_dir(args), args.seconds, settings["rollouts_per_update"], started)],
        )
        stop_printing(trainer)
        require_same_prompts(tokenizer, dataset, lambda messages: trainer._tokenize_prompts(messages)[0])
        trainer.train()
        trainer.save_model(str(trl_dir(args) / f"checkpoint-{trainer.state.global_step}"))
        runner.run(environment.aclose())


def _clock(folder: Path, limit: float | None, rollouts: int, started: float) -> Any:
    from transformers import TrainerCallback

    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "trl.jsonl"
    lines.write_text("")

    class Clock(TrainerCallback):
        """Writes each update's line, and stops at the deadline."""

        begun = logged = started

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "reward" not in logs:
                return
            seconds = time.perf_counter() - self.begun
            point = {"step": state.global_step, "rollouts": rollouts * state.global_step, "seconds": seconds,
                     "load_s": self.begun - started, "correct_rate": float(logs["reward"])}  # fmt: skip
            with lines.open("a") as file:
                file.write(json.dumps(point) + "\n")
            sys.stdout.write(json.dumps(point) + "\n")
            sys.stdout.flush()
            self.logged = time.perf_counter()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """A checkpoint is no part of what is compared: ludic's side writes none on the way."""
            self.begun += time.perf_counter() - self.logged

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if limit and time.perf_counter() - self.begun > limit:
                control.should_training_stop = True

    return Clock()


# -- the picture -------------------------------------------------------------------------------------------------------


def sides(args: argparse.Namespace) -> dict[str, dict[str, list[Any]]]:
    """Of both: the updates' points, and (rollouts, seconds, accuracy, low, high) of what was scored, the warm-up first."""
    record, entry = Path(args.record), json.loads((seed_dir(args) / "entry.json").read_text())
    first = (0, 0.0, *_accuracy(record / "score_warm_up.jsonl"))
    curve = entry["curve"]
    last = (curve[-1]["rollouts"], curve[-1]["seconds"], *_accuracy(seed_dir(args) / "score_grpo.jsonl"))
    taken = [
        (one["rollouts"], one["seconds"], *one["greedy_strict_ci95"]) for one in curve[:-1] if one["greedy_strict_ci95"]
    ]
    found = {"ludic": {"updates": curve, "scored": [first, *taken, last]}}
    lines = trl_dir(args) / "trl.jsonl"
    if lines.exists():
        updates = [json.loads(line) for line in lines.read_text().splitlines()]
        at = {point["step"]: point for point in updates}
        paths = {int(path.stem.rpartition("-")[2]): path for path in trl_dir(args).glob("score_checkpoint-*.jsonl")}
        scored = [
            (at[n]["rollouts"], at[n]["seconds"], *_accuracy(path)) for n, path in sorted(paths.items()) if n in at
        ]
        found["TRL"] = {"updates": updates, "scored": [first, *scored]}
    return found


def _accuracy(records: Path) -> tuple[float, float, float]:
    """By the strict rule, with its interval at 95%."""
    summary = json.loads(Path(f"{records}.summary.json").read_text())
    return summary["strict_accuracy"], *summary["strict_accuracy_ci95"]


def draw(args: argparse.Namespace) -> Path:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    for axes, (place, label) in zip(
        picture.subplots(1, 2), enumerate(("rollouts", "seconds of training")), strict=True
    ):
        for colour, (name, side) in zip(("#1f4e8c", "#a3293c"), sides(args).items(), strict=False):
            x = [one[label.partition(" ")[0]] for one in side["updates"]]
            axes.plot(x, [100 * one["correct_rate"] for one in side["updates"]], color=colour, alpha=0.35, linewidth=1,
                      label=f"{name}: samples right, training problems")  # fmt: skip
            scored = side["scored"]
            y = [100 * one[2] for one in scored]
            bars = [[100 * (one[2] - one[3]) for one in scored], [100 * (one[4] - one[2]) for one in scored]]
            axes.errorbar([one[place] for one in scored], y, yerr=bars, color=colour, fmt="o-", capsize=3,
                          label=f"{name}: greedy, test problems")  # fmt: skip
        axes.set_xlabel(label)
        axes.set_ylabel("right, %, strict rule")
        axes.grid(axis="y", color="#e3e3e3")
        axes.legend(fontsize=8, frameon=False)
    out = Path(args.record) / f"record_seed_{args.seed}.png"
    picture.savefig(out)
    return out


def main() -> None:
    args = build_parser().parse_args()
    try:
        if args.picture:
            sys.stdout.write(f"written: {draw(args)}\n")
        else:
            train(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"record_trl.py: {error}") from error


if __name__ == "__main__":
    main()

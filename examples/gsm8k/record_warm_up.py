"""The first phase of `record.py`: a pretrained model imitates GSM8K's worked answers, each ending in a box.

A small model solves next to nothing as it is, so that a reward has nothing to reinforce. The warm-up is an ordinary model folder;
beside it a JSON file says how it was made, and is there only if the folder is whole.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from environments.gsm8k import GSM8K, GSM8KSample, worked
from ludic.cli import hide_loading_bars, say
from ludic.task.pretrained import load_config, load_model, stored_dtype
from ludic.task.prompts import load_tokenizer

if TYPE_CHECKING:
    import torch

SAID_EVERY_S = 5.0


def about(warm_up: Path) -> Path:
    """The file that says how a warm-up was made."""
    return warm_up.with_name(f"{warm_up.name}.json")


def make(
    model_name: str,
    out: Path,
    samples: Sequence[GSM8KSample],
    *,
    device: "torch.device",
    max_seq_len: int,
    max_tokens: int,
    micro_token_budget: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train on all `samples` whose worked answer has fewer than `max_tokens` tokens, and write the model to `out`.

    Raises:
        ValueError: there are none, or one is longer than `max_seq_len` with its prompt; one line.
    """
    import torch

    from ludic.train.warm_start import warm_start

    started = said = time.perf_counter()
    hide_loading_bars()
    torch.manual_seed(0)
    tokenizer, dtype = load_tokenizer(model_name), stored_dtype(load_config(model_name))
    model = load_model(model_name, dtype=torch.float32)
    torch.nn.Module.to(model, device)
    environment, answers = GSM8K(), [worked(one) for one in samples]
    lengths = map(len, tokenizer(answers, add_special_tokens=False)["input_ids"])
    examples = [
        (environment.messages(one), answer)
        for one, answer, length in zip(samples, answers, lengths, strict=True)
        if length < max_tokens
    ]
    steps = max(1, round(epochs * len(examples) / batch_size))

    def progress(step: int, loss: float) -> None:
        nonlocal said
        if step in (1, steps) or time.perf_counter() - said > SAID_EVERY_S:
            said = time.perf_counter()
            say(f"warm-up: step {step} of {steps} after {said - started:.1f} s, loss {loss:.3f}")

    losses = warm_start(
        model,
        tokenizer,
        examples,
        max_seq_len=max_seq_len,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        micro_token_budget=micro_token_budget,
        on_step=progress,
    )
    torch.nn.Module.to(model, dtype)
    model.config.dtype = dtype
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {"model": model_name, "problems": len(examples), "epochs": epochs, "steps": steps, "batch": batch_size,
             "lr": learning_rate, "first_loss": losses[0], "last_loss": losses[-1],
             "seconds": time.perf_counter() - started}  # fmt: skip
    about(out).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    say(f"warm-up: {out} after {facts['seconds']:.1f} s")

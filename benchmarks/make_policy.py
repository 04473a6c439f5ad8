"""Make a GSM8K policy by a short supervised training on the training split: from nothing, or from a pretrained model.

    PYTHONPATH=. uv run python benchmarks/make_policy.py --dataset DIR --out DIR --shape 0.5b --seconds 90
    PYTHONPATH=. uv run python benchmarks/make_policy.py --dataset DIR --out DIR --from MODEL --steps 233

From nothing it makes the tokenizer and the chat template too. Such a policy hardly solves a problem, but it writes solutions
of the usual length that end by themselves with a boxed number, which is what a benchmark of the training loop needs and what
random weights cannot give. From a small pretrained model, which solves almost nothing as it is, it makes one that has
something to learn from. DIR holds GSM8K's train.jsonl. A number of steps gives the same policy again, up to the rounding of
the kernels; a number of seconds does not.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environments.gsm8k import DEFAULT_SYSTEM_PROMPT, GSM8K, GSM8KSample, load
from ludic.task.pretrained import load_model
from ludic.task.prompts import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen2.5's own shapes, vocabulary included, and one for CPUs. The tokenizer uses 8,192 (or 4,096) of the entries."""

TRAINING: dict[str, Any] = {"seconds": 90.0, "budget": 16384, "batch_size": 64, "lr": 3e-4}
"""Of the shapes for a GPU: see the flags."""
TINY_TRAINING: dict[str, Any] = {"seconds": 40.0, "budget": 2048, "batch_size": 8, "lr": 3e-3}
"""Two CPU cores take a quarter of a second over 8 solutions: small steps, or there are too few of them to learn where to end."""
PRETRAINED_TRAINING: dict[str, Any] = {**TRAINING, "seconds": None, "steps": 233, "lr": 1.5e-4}
"""Two epochs of GSM8K's 7,473 problems."""
MAX_SEQ_LEN = 2048
"""Tokens of a problem and its solution."""
PROGRESS_S = 10.0

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(samples: list[GSM8KSample], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the problems, with single digits as tokens and Qwen's chat markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=markers,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{sample.question}\n{solution(sample)}" for sample in samples] + [DEFAULT_SYSTEM_PROMPT] * 50
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def solution(sample: GSM8KSample) -> str:
    """GSM8K's worked answer without its calculator marks, ending in a box instead of `####`."""
    worked = re.sub(r"<<[^>]*>>", "", sample.answer).rpartition("####")[0].strip()
    return f"{worked}\nThe answer is \\boxed{{{sample.target}}}."


def build_model(
    shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A Qwen2 with random weights, made on the device: a large one would take minutes on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        **{"tie_word_embeddings": True, **shape},
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder with GSM8K's train.jsonl")
    parser.add_argument("--out", required=True, type=Path, help="folder for the policy")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument(
        "--shape", choices=tuple(SHAPES), default="0.5b", help="of a policy from nothing (default: 0.5b)"
    )
    origin.add_argument(
        "--from", dest="pretrained", metavar="MODEL", help="folder or hub name of a model with a chat template"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--random", action="store_true", help="random weights, at once: enough to measure speed")
    length.add_argument(
        "--steps", type=int, help=f"of supervised training (default with --from: {PRETRAINED_TRAINING['steps']})"
    )
    length.add_argument(
        "--seconds",
        type=float,
        help=f"of it, in place of steps (default: {TRAINING['seconds']:g}; {TINY_TRAINING['seconds']:g} for tiny)",
    )
    for name, kind, words in (
        ("budget", int, "tokens of a micro-batch"),
        ("batch_size", int, "solutions a step"),
        ("lr", float, "peak learning rate"),
    ):
        default = f"(default: {TRAINING[name]:g}; {TINY_TRAINING[name]:g} for tiny, {PRETRAINED_TRAINING[name]:g} with --from)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{words} {default}")
    args = parser.parse_args()
    if args.pretrained and args.random:
        parser.error("--from MODEL is trained: it contradicts --random")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    defaults = PRETRAINED_TRAINING if args.pretrained else TINY_TRAINING if args.shape == "tiny" else TRAINING
    length_given = args.steps is not None or args.seconds is not None
    for name, value in defaults.items():
        if getattr(args, name) is None and not (length_given and name in ("steps", "seconds")):
            setattr(args, name, value)
    import torch  # --help and wrong flags answer without it

    from ludic.train.warm_start import warm_start

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = load("train", dataset=args.dataset)
    if args.pretrained:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(args.pretrained)
        model = load_model(args.pretrained, dtype=torch.float32)
        torch.nn.Module.to(model, device)
    else:
        shape = SHAPES[args.shape]
        made = build_tokenizer(samples, min(8192, shape["vocab_size"]))
        tokenizer, model = made, build_model(shape, made, device, torch.bfloat16 if args.random else torch.float32)
    trained = "random weights"
    if not args.random:
        environment = GSM8K(system_prompt=DEFAULT_SYSTEM_PROMPT)
        started = said = time.perf_counter()

        def progress(step: int, loss: float) -> None:
            nonlocal said
            if time.perf_counter() - said >= PROGRESS_S:
                said = time.perf_counter()
                sys.stderr.write(f"{step} steps after {said - started:.0f} s, loss {loss:.2f}\n")

        losses = warm_start(
            model,
            tokenizer,
            [(environment.messages(sample), solution(sample)) for sample in samples],
            max_seq_len=min(MAX_SEQ_LEN, args.budget),
            steps=args.steps,
            seconds=args.seconds,
            batch_size=args.batch_size,
            learning_rate=args.lr,
            micro_token_budget=args.budget,
            on_step=progress,
        )
        trained = f"{len(losses)} steps in {time.perf_counter() - started:.0f} s, loss {losses[-1]:.2f}"
        torch.nn.Module.to(model, torch.bfloat16)
        model.config.dtype = torch.bfloat16
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    sys.stdout.write(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters, {trained}\n")


if __name__ == "__main__":
    main()

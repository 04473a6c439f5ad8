"""What to type after an evaluation in order to train on from the weights that were scored.

The command works as it is printed, in the folder in which the evaluation was called: with its engine or a server that training
starts, its problems, prompt and lengths, and an --out-dir of its own.
"""

import argparse
import os
import shlex
from pathlib import Path

from environments.gsm8k import load
from ludic.cli import DEFAULT_HOST, DEFAULT_PORT
from ludic.inference.weights_in_use import WeightsInUse
from ludic.pretrained import load_config
from ludic.training.config import GRPOConfig, RunPaths


def training_advice(args: argparse.Namespace, weights: WeightsInUse, *, longest: int) -> list[str]:
    """What to type next: a command that works as it stands, or why there is none. `longest` is a prompt's tokens."""
    model = args.tokenizer or args.model
    if weights.from_run:
        folder = RunPaths(out_dir=Path(weights.out_dir or "")).checkpoints / f"step_{weights.policy_version}"
        if not (weights.out_dir and folder.is_dir()):
            return [
                "no command trains on from here: these weights are on the server, and in no checkpoint of their run"
            ]
        model = str(folder)
    problems = _training_problems(args)
    if problems is None:
        return [f"no command trains on from here: {args.dataset} holds no problems to train on"]
    notes, data = problems
    words = ["uv", "run", "python", os.path.relpath(Path(__file__).with_name("train_gsm8k.py")), "--model", model]
    words += [*data, *_engine_flags(args, weights, model), "--system-prompt", args.system_prompt]
    if args.chat_template:
        words += ["--chat-template", args.chat_template]
    if args.trust_remote_code:
        words += ["--trust-remote-code"]
    words += _lengths(args, weights, longest)
    words += ["--out-dir", str(Path(args.out_dir) / f"train_from_{Path(model).name}")]  # the run there may own --model
    return [*notes, "next, to train on from here:", "  " + shlex.join(words)]


def _training_problems(args: argparse.Namespace) -> tuple[list[str], list[str]] | None:
    """What to say of the problems to train on, and the flags that name them; None where there are none."""

    def has(split: str, dataset: Path) -> bool:
        try:
            return bool(load("train" if split == "train" else "test", dataset=dataset, limit=1))
        except ValueError:
            return False

    if args.dataset is None:
        return [], []
    path = Path(args.dataset).expanduser()
    if path.is_dir() and has("train", path):
        return [], ["--dataset", args.dataset, *([] if has("test", path) else ["--eval-limit", "0"])]
    if path.is_dir() and not (path := path / f"{args.split}.jsonl").is_file():
        return None
    return [f"the command below trains on the problems that were scored, {path}: name others with --dataset"], [
        "--dataset",
        str(path),
    ]


def _engine_flags(args: argparse.Namespace, weights: WeightsInUse, model: str) -> list[str]:
    """The same engine, where it can be trained with and serves `model`; else a server that training starts."""
    if args.engine == "local":
        return ["--engine", "local"]
    key = ["--api-key-file", args.api_key_file] if args.api_key_file else []
    if weights.is_ours and model == args.model and not args.start_server:
        where = ["--base-url", args.base_url] if args.base_url else []
        where += ["--host", args.host] if args.host != DEFAULT_HOST else []
        return [*where, *(["--port", str(args.port)] if args.port != DEFAULT_PORT else []), *key]
    port = args.port if args.start_server else DEFAULT_PORT + (args.port == DEFAULT_PORT)  # the other one is taken
    started = ["--start-server", "--port", str(port)]
    for flag in ("host", "server_gpu", "server_args"):
        value = getattr(args, flag)
        if args.start_server and value not in (None, "", DEFAULT_HOST):
            started += [f"--{flag.replace('_', '-')}", str(value)]
    return [*started, *key]


def _lengths(args: argparse.Namespace, weights: WeightsInUse, longest: int) -> list[str]:
    """Completions as long as here, in a context that the model, and a server that is kept, have."""
    config = load_config(args.tokenizer or args.model, trust_remote_code=args.trust_remote_code).get_text_config()
    limits = [weights.max_model_len, getattr(config, "max_position_embeddings", None)]
    default = GRPOConfig()
    max_seq_len = min([max(default.max_seq_len, longest + args.max_tokens), *filter(None, limits)])
    words = ["--max-completion-len", str(min(args.max_tokens, max_seq_len - 1))]
    if max_seq_len != default.max_seq_len:
        words += ["--max-seq-len", str(max_seq_len)]
    if default.micro_token_budget is not None and max_seq_len > default.micro_token_budget:
        words += ["--micro-token-budget", str(max_seq_len)]
    return words

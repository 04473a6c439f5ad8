"""What to type next: after a training the command that evaluates its checkpoint, after an evaluation the one that trains on.

A command works as it is printed, in the folder in which it was printed: with the same engine or a server that it starts, the
same problems, prompt and lengths. Where there is none, the reason is said instead.
"""

import argparse
import os
from pathlib import Path

from environments.gsm8k import NAME, load
from ludic.cli import DEFAULT_HOST, DEFAULT_PORT
from ludic.commands import flag, python_command
from ludic.config import GRPOConfig, RunPaths
from ludic.inference.client.weights_in_use import WeightsInUse
from ludic.task.datafiles import split_files
from ludic.task.pretrained import load_config


def evaluation_advice(args: argparse.Namespace, config: GRPOConfig, checkpoint: str | None, out_dir: Path) -> list[str]:
    """How to evaluate the last checkpoint on problems that were not trained on; or why there is no command for it."""
    if checkpoint is None:
        return ["no command evaluates this run: it has no checkpoint"]
    problems = args.eval_dataset or args.dataset
    if problems is not None and args.eval_dataset is None and not Path(problems).expanduser().is_dir():
        return [f"no command evaluates this run: all of {problems} was trained on; name others with --eval-dataset"]
    words = [os.path.relpath(Path(__file__).with_name("eval_gsm8k_vllm.py")), "--model", checkpoint]
    words += ["--engine", "local"] if args.engine == "local" else _started_server(args)
    words += ["--dataset", problems] if problems else []
    words += flag("--system-prompt", args.system_prompt) if args.system_prompt else []
    words += _template_flags(args)
    words += ["--max-tokens", str(config.max_completion_len or 512), "--max-seq-len", str(config.max_seq_len)]
    words += [
        "--out-dir",
        str(out_dir),
        "--out",
        f"gsm8k_eval_{Path(checkpoint).name}.jsonl",
        "--limit",
        str(config.eval_limit or 250),
    ]
    return ["next, to evaluate the checkpoint:", "  " + python_command(*words)]


def training_advice(args: argparse.Namespace, weights: WeightsInUse, *, longest: int) -> list[str]:
    """What to type next: a command that works as it stands, or why there is none. `longest` is a prompt's tokens."""
    model = args.tokenizer or args.model
    if weights.from_run:
        folder = RunPaths(out_dir=Path(weights.out_dir or ""), name=NAME).checkpoints / f"step_{weights.policy_version}"
        if not (weights.out_dir and folder.is_dir()):
            return [
                "no command trains on from here: these weights are on the server, and in no checkpoint of their run"
            ]
        model = str(folder)
    problems = _training_problems(args)
    if problems is None:
        return [f"no command trains on from here: {args.dataset} holds no problems to train on"]
    notes, data = problems
    words = [os.path.relpath(Path(__file__).with_name("train_gsm8k.py")), "--model", model]
    words += [*data, *_engine_flags(args, weights, model), *flag("--system-prompt", args.system_prompt)]
    words += _template_flags(args)
    words += _lengths(args, weights, longest)
    words += ["--out-dir", str(Path(args.out_dir) / f"train_from_{Path(model).name}")]  # the run there may own --model
    return [*notes, "next, to continue training from these weights:", "  " + python_command(*words)]


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
    try:
        path, *others = split_files(args.split, path)
    except ValueError:  # the folder was moved meanwhile
        return None
    if others:  # --dataset takes one file, and of a folder those of the split `train`
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
        where += [word for url in args.server or () for word in ("--server", url)]
        where += ["--host", args.host] if args.host != DEFAULT_HOST else []
        return [*where, *(["--port", str(args.port)] if args.port != DEFAULT_PORT else []), *key]
    return [*_started_server(args), *key]


def _started_server(args: argparse.Namespace) -> list[str]:
    """The flags of a server that the command starts, as the one that this program started, if it did."""
    port = args.port if args.start_server else DEFAULT_PORT + (args.port == DEFAULT_PORT)  # the other one is taken
    started = ["--start-server", "--port", str(port)]
    for name in ("host", "server_gpu", "server_args"):
        value = getattr(args, name)
        if args.start_server and value not in (None, "", DEFAULT_HOST):
            started += flag(f"--{name.replace('_', '-')}", str(value))
    return started


def _template_flags(args: argparse.Namespace) -> list[str]:
    template = ["--chat-template", args.chat_template] if args.chat_template else []
    return [*template, *(["--trust-remote-code"] if args.trust_remote_code else [])]


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

"""What `test_ranks` looks at, computed by real process groups over gloo: one process per world, forked from this one.

`python -m tests.ranks_checks OUT` writes one JSON object. Forked, so that torch and transformers are imported once.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]
from transformers import Qwen2Config, Qwen2ForCausalLM

from ludic.config import GRPOConfig
from ludic.inference.client.server_process import free_port
from ludic.train.learner import Learner
from ludic.train.losses import LOSSES
from ludic.train.optimizer_state import save_optimizer
from ludic.train.rank_learner import RankLearner
from ludic.train.ranks import Ranks
from ludic.train.replicated import ReplicatedLearner
from ludic.train.sharded import ShardedLearner
from ludic.types import TrainingSample
from tests.conftest import make_digit_policy, write_digit_problems

SCRIPT = Path(__file__).parents[1] / "examples/gsm8k/train_gsm8k.py"
GROUPS = ((5, (9, 4)), (9, (1,)), (4, (12, 8, 5)))
"""(prompt, completions): tokens of each group. Its samples share the prompt."""
CASES: dict[str, dict[str, Any]] = {
    **{loss: {"loss": loss} for loss in LOSSES},
    "unshared": {"share_prompts": False},
    "checkpointed": {"gradient_checkpointing": True},
    "sharded": {"shard_weights": True},
    "decayed": {"weight_decay": 0.5, "max_grad_norm": 0.1},
    "sharded decayed": {"shard_weights": True, "weight_decay": 0.5, "max_grad_norm": 0.1},
    "offloaded": {"cpu_offload": True},
    "sharded epochs": {"shard_weights": True, "epochs_per_update": 2, "loss": "gspo", "kl_coef": 0.1},
    "sharded checkpointed": {"shard_weights": True, "gradient_checkpointing": True},
    "reference": {"kl_coef": 0.1},
    "epochs": {"epochs_per_update": 2, "loss": "gspo"},
    "untied": {},
    "prompt_mean": {"normalisation": "prompt_mean"},
    "sampler": {"ratio_to": "sampler", "loss": "gspo", "tis_cap": None},
    "masked": {"importance_mask": "token", "tis_cap": None},
}
WORLDS = {2: list(CASES), 4: [*LOSSES, "sharded"]}
"""The cases of each number of ranks."""


def model(seed: int, *, tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=61, hidden_size=16, intermediate_size=30, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def samples() -> list[TrainingSample]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for group, (prompt_len, lengths) in enumerate(GROUPS):
        prompt = torch.randint(3, 61, (prompt_len,), generator=draw).tolist()
        for member, length in enumerate(lengths):
            completion = torch.randint(3, 61, (length,), generator=draw).tolist()
            known = (-4 * torch.rand(length, generator=draw)).tolist()
            made.append(
                TrainingSample(
                    token_ids=[*prompt, *completion],
                    loss_mask=[False] * prompt_len + [True] * length,
                    rollout_logprobs=[0.0] * prompt_len + known,
                    advantage=1.0 - 0.7 * member,
                    rollout=(group, member),
                )
            )
    return made


def settings(case: str) -> GRPOConfig:
    return GRPOConfig(
        **{"max_seq_len": 32, "rollouts_per_update": 8, "group_size": 2, "max_grad_norm": 0.0, "tis_cap": 1.1,
           "micro_token_budget": 36, **CASES[case]},
    )  # fmt: skip


def learner_of(case: str, ranks: Ranks | None) -> Learner:
    config, policy = settings(case), model(0, tied=case != "untied")
    reference = model(1) if config.kl_coef else None
    if ranks is None:
        return Learner(config, policy, reference_model=reference)
    kind = ShardedLearner if config.shards_weights else ReplicatedLearner
    return kind(config, policy, ranks=ranks, reference_model=reference)


def update(learner: Learner) -> dict[str, Any]:
    """Two updates; the second has one sequence. The state after each, and what was logged."""
    parts = samples()
    learner.add_up(parts[:4])  # as the trial of a token budget
    learner.discard()
    learner.accumulate(parts[:4])
    learner.accumulate(parts[4:])
    figures = learner.step(learning_rate=1e-2, num_without_loss=1)
    first = state_of(learner)
    learner.accumulate(parts[:1])
    learner.step(learning_rate=1e-2)
    return {"figures": figures, "first": first, "second": state_of(learner)}


def state_of(learner: Learner) -> dict[str, list[float]]:
    """The gradient by way of AdamW's first moment, the masters, and what an engine would be sent."""
    weights, optimizer = learner.full_state()
    names = [name for name, _ in learner.model.named_parameters()]
    moments = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "gradient": [float(x) for state in moments for x in state["exp_avg"].flatten() / 0.1],
        "masters": [float(x) for name in names for x in weights[name].flatten()],
        "sent": [float(x) for parameter in learner.model.parameters() for x in parameter.detach().flatten()],
    }


def on_processes(size: int, work: Callable[[int], Any], *, patience_s: float = 20.0) -> list[dict[str, Any]]:
    """Of each of `size` processes, with torchrun's variables set: what `work(rank)` returned, what it printed, how it ended."""
    context, port = multiprocessing.get_context("fork"), free_port("127.0.0.1")
    # The parent has the store, as torchrun's agent has, so that it outlives every rank.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(size)]
        ranks = [
            context.Process(target=_one_process, args=(rank, size, port, files[rank], work)) for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        ranks[0].join(120)
        for rank in ranks:
            rank.join(patience_s)  # one that was stopped ends in no other way
        for rank in ranks:
            rank.kill()
            rank.join()
        del store
        return [
            {
                "answer": json.loads(file.read_text()) if file.exists() else None,
                "printed": file.with_suffix(".out").read_text(),
                "code": rank.exitcode,
            }
            for file, rank in zip(files, ranks, strict=True)
        ]


def _one_process(rank: int, size: int, port: int, file: Path, work: Callable[[int], Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")
    with open(file.with_suffix(".out"), "w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    file.write_text(json.dumps(work(rank)))
    sys.stdout.flush()
    os._exit(0)


def on_ranks(size: int, work: Callable[[Ranks], Any], *, lost_s: float = 60.0) -> list[Any]:
    """What `work` returns on each rank, or the last words of one that raised or left."""

    def one(rank: int) -> Any:
        ranks = Ranks(leave=lambda line: (print(line, flush=True), os._exit(1)), lost_s=lost_s)
        try:
            answer = work(ranks)
            ranks.share(None)
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
            if rank:
                ranks.fail(error)
                ranks.await_the_word_of_rank_0()
        ranks.close()
        return answer

    return [one["answer"] or {"left": one["printed"]} for one in on_processes(size, one, patience_s=2.0)]


def driven(ranks: Ranks, learner: Learner, work: Callable[[Learner], Any]) -> Any:
    """`work` with the learner of rank 0; the others follow."""
    assert isinstance(learner, RankLearner)
    if ranks.rank:
        learner.follow()
        return None
    result = work(learner)
    ranks.tell([("end", ())] * ranks.size)
    return result


def cases(ranks: Ranks) -> Any:
    return {case: driven(ranks, learner_of(case, ranks), update) for case in WORLDS[ranks.size]}


class _InBF16(RankLearner):
    """As on a GPU: it computes in bf16."""

    def _prepare(self, model: Any, reference: Any, compute_dtype: torch.dtype, checkpoint: Any) -> None:
        super()._prepare(model, reference, torch.bfloat16, checkpoint)


class _ReplicatedInBF16(_InBF16, ReplicatedLearner):
    pass


class _ShardedInBF16(_InBF16, ShardedLearner):
    pass


def in_bf16(ranks: Ranks) -> Any:
    answers = {}
    for kind, case in ((_ReplicatedInBF16, "grpo"), (_ShardedInBF16, "sharded")):
        learner = kind(settings(case), model(0), ranks=ranks)
        dtypes = [str(learner.masters.parameters[0].dtype), str(next(learner.model.parameters()).dtype)]
        answers[case] = driven(ranks, learner, partial(_with_dtypes, dtypes))
    return answers


def _with_dtypes(dtypes: list[str], learner: Learner) -> dict[str, Any]:
    return {"dtypes": dtypes, **update(learner)}


def resumed(folder: Path) -> Callable[[Ranks], Any]:
    def work(ranks: Ranks) -> Any:
        moments = []
        for case in ("grpo", "sharded"):
            learner = learner_of(case, ranks)
            learner.resume(folder)
            moments.append(driven(ranks, learner, state_of_moments))
        return moments

    return work


def state_of_moments(learner: Learner) -> list[float]:
    _, optimizer = learner.full_state()
    return [float(x) for state in optimizer.state.values() for part in sorted(state) for x in state[part].flatten()]


def damaged(ranks: Ranks) -> Any:
    """A weight of rank 1 is not finite: what rank 0 raises, and whether the ranks go on to do as it says."""
    learner = learner_of("grpo", ranks)
    if ranks.rank == 1:
        next(piece for piece in learner.masters.parameters if piece.numel()).data[0] = torch.nan

    def raised(learner: Learner) -> dict[str, Any]:
        try:
            update(learner)
        except FloatingPointError as error:
            return {"error": str(error), "tensors": len(learner.full_state()[0]), "failure": ranks.failure()}
        return {}

    return driven(ranks, learner, raised)


# -- faults ----------------------------------------------------------------------------------------------------------


def broken(name: str, how: Callable[[], None]) -> Callable[[Ranks], Any]:
    """An update in which the method `name` of rank 1's learner does something else."""

    def work(ranks: Ranks) -> Any:
        learner = learner_of("grpo", ranks)
        if ranks.rank == 1:
            setattr(learner, name, lambda *_: how())
        return driven(ranks, learner, update)

    return work


def raise_an_error() -> None:
    raise ValueError("broken on purpose")


FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
    "raised": ("_rows_here", raise_an_error),
    "killed": ("_step_here", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "stopped": ("_step_here", lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}


def fault(name: str) -> dict[str, Any]:
    started = time.monotonic()
    answer = on_ranks(2, broken(*FAULTS[name]), lost_s=4.0)[0]
    return {"answer": answer, "seconds": time.monotonic() - started}


def script(*words: str, of_rank_1: tuple[str, ...] = (), restarts: int = 0) -> Callable[[int], None]:
    """The training script, with more flags on rank 1."""

    def work(rank: int) -> None:
        os.environ |= {"TORCHELASTIC_RUN_ID": "a-job", "TORCHELASTIC_RESTART_COUNT": str(restarts)}
        sys.path.insert(0, str(SCRIPT.parent))
        sys.argv = [str(SCRIPT), *words, *(of_rank_1 if rank == 1 else ())]
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return work


def weights(checkpoint: Path) -> list[float]:
    return [
        float(x)
        for _, tensor in sorted(load_file(checkpoint / "model.safetensors").items())
        for x in tensor.flatten()[:50]
    ]


def script_runs(folder: Path) -> dict[str, Any]:
    """The same run of three updates: by one process, and by two ranks that three others resume after the second update."""
    make_digit_policy(folder / "policy", tie_word_embeddings=True)
    write_digit_problems(folder / "train.jsonl", 12)
    flags = [
        *("--model", str(folder / "policy"), "--dataset", str(folder / "train.jsonl"), "--engine", "local"),
        *("--rollouts-per-update", "16", "--group-size", "4", "--max-tokens", "14", "--max-seq-len", "192"),
        *("--lr", "3e-3", "--warmup-steps", "0", "--max-grad-norm", "0", "--logger", "none", "--eval-limit", "0"),
        *("--save-every", "1", "--no-checks"),
    ]
    alone, shared = str(folder / "alone"), str(folder / "shared")
    return {
        "disagree": on_processes(2, script(*flags, "--out-dir", shared, of_rank_1=("--seed", "7"))),
        "too many": on_processes(
            3, script(*flags, "--rollouts-per-update", "2", "--group-size", "2", "--out-dir", shared)
        ),
        "alone": on_processes(1, script(*flags, "--train-steps", "3", "--out-dir", alone)),
        "shared": on_processes(2, script(*flags, "--train-steps", "2", "--out-dir", shared, restarts=0)),
        "resumed": on_processes(3, script(*flags, "--train-steps", "3", "--out-dir", shared, restarts=1)),
        "weights": [weights(Path(name) / "checkpoints_gsm8k/step_3") for name in (alone, shared)],
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    answers: dict[str, Any] = {"1": {case: update(learner_of(case, None)) for case in CASES}}
    for size in WORLDS:
        answers[str(size)] = on_ranks(size, cases)[0]
    alone = learner_of("grpo", None)
    update(alone)
    folder = out.parent / "optimizer"
    folder.mkdir()
    save_optimizer(folder, alone.optimizer, alone.masters.names)
    answers["bf16"] = on_ranks(2, in_bf16)[0]
    answers["moments"] = state_of_moments(alone)
    answers["moments of 3 ranks"] = on_ranks(3, resumed(folder))[0]
    answers["damaged"] = on_ranks(2, damaged)[0]
    answers["faults"] = {name: fault(name) for name in FAULTS}
    answers["script"] = script_runs(out.parent)
    out.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

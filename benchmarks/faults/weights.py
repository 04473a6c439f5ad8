"""Weights that are corrupted on the way to the server, or in it: does the proof of the sync find each one?

    python -m benchmarks.faults.weights --count 1000                       a receiving half in this process, both transports
    python -m benchmarks.faults.weights --count 60 --model DIR             also a real vLLM server on the CPU, which it starts

Every corruption is followed by a sync of which nothing is corrupted, which must succeed: the first half of the count says what
is missed, the second what is found though it is not there. Prints a line a kind, and what the proof costs.
"""

import argparse
import contextlib
import functools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.damage import flip_bit, other_values, same_shape_pairs
from benchmarks.faults.model_server import ModelServer
from benchmarks.faults.outcome import Injection
from ludic.inference.client.server_control import ServerControl
from ludic.inference.weights.weight_sync import WeightSync
from ludic.rollout.engine import WeightSyncReport
from ludic.rollout.errors import WeightSyncError
from ludic.train.attention import prepare_packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW = "weights corrupted on the way"
CLEAN = "nothing corrupted"
PROBE = [3, 70, 71, 72, 80, 90, 4]
FILE_KINDS = ("one bit", "one tensor", "missing", "missing and not announced", "swapped", "cut file")
BYTE_KINDS = ("one bit", "one bucket", "half an update")
HELD_KINDS = ("one bit", "one tensor", "missing", "swapped", "stale head", "half an update")
SERVER_EXTENSION = "benchmarks.faults.weight_hooks.DamagingWorker"
CPU_SERVER_ARGS = ("--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "32")
PROOF_PHASES = ("digests", "probe")


# -- the policy ------------------------------------------------------------------------------------------------------------


def small_model(seed: int, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A two-layer Qwen2 with tied embeddings, random but for its seed."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return torch.nn.Module.to(model, dtype)


@torch.no_grad()
def train_a_little(model: "PreTrainedModel", rng: random.Random) -> None:
    """Change every element a little, as an optimizer's step does, so that each tensor from before is a stale one."""
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * 0.02 * parameter.std().nan_to_num(1.0).clamp(min=0.05))


# -- what goes wrong -------------------------------------------------------------------------------------------------------


def damage_file(kind: str, rng: random.Random, update_info: dict[str, Any]) -> None:
    """Rewrite the file that the server is about to read."""
    path = Path(update_info["path"])
    if kind == "cut file":
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
        return
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = rng.choice(sorted(tensors))
    if kind == "one bit":
        flip_bit(tensors[name], rng)
    elif kind == "one tensor":
        tensors[name] = other_values(tensors[name], rng)
    elif kind == "swapped":
        first, second = rng.choice(same_shape_pairs(tensors))
        tensors[first], tensors[second] = tensors[second], tensors[first]
    else:
        del tensors[name]
        if kind == "missing and not announced":
            update_info["names"].remove(name)
            del update_info["digests"][name]
    save_file(tensors, path)


def damage_bytes(kind: str, rng: random.Random, buckets: int) -> Callable[[torch.Tensor], None]:
    """To be called with each bucket as it arrives; damages one of them, or all from one on."""
    first, seen = rng.randrange(buckets), [0]

    def damage(data: torch.Tensor) -> None:
        number, seen[0] = seen[0], seen[0] + 1
        if kind == "half an update" and number >= first:
            data.zero_()
        elif kind == "one bucket" and number == first:
            data.random_(0, 256, generator=torch.Generator().manual_seed(rng.getrandbits(60)))
        elif number == first:
            place = int(data.nonzero()[rng.randrange(int(data.count_nonzero()))])
            data[place] ^= 1 << rng.randrange(8)

    return damage


@torch.no_grad()
def damage_model(kind: str, rng: random.Random, before: dict[str, torch.Tensor], model: "PreTrainedModel") -> None:
    """Damage what a server has received; `before` is what it held until then."""
    held = dict(model.named_parameters())
    names = sorted(held)
    name = rng.choice(names)
    if kind == "one bit":
        flip_bit(held[name], rng)
    elif kind == "one tensor":
        held[name].copy_(other_values(held[name], rng))
    elif kind == "swapped":
        first, second = rng.choice(same_shape_pairs(held))
        values = held[first].clone()
        held[first].copy_(held[second])
        held[second].copy_(values)
    else:
        stale = {
            "missing": [name],
            "stale head": ["model.embed_tokens.weight"],
            "half an update": names[rng.randrange(1, len(names)) :],
        }[kind]
        for one in stale:
            held[one].copy_(before[one])


# -- a sync with it and one without ----------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Trial:
    """One trainer and one server; `injections` and `reports` grow."""

    policy: "PreTrainedModel"
    sync: WeightSync
    rng: random.Random
    injections: list[Injection] = field(default_factory=list)
    reports: list[WeightSyncReport] = field(default_factory=list)
    version: int = 0

    def once(self, fault: str) -> None:
        """Train a little, sync, and say what came of it."""
        train_a_little(self.policy, self.rng)
        self.version += 1
        started = time.perf_counter()
        try:
            report = self.sync.sync(self.policy, self.version)
        except WeightSyncError as error:
            found, outcome = True, _found_by(str(error))
        else:
            found, outcome = False, "taken as right"
            if fault == CLEAN:
                self.reports.append(report)
        seconds = time.perf_counter() - started
        ok = found != (fault == CLEAN)
        self.injections.append(Injection(row=ROW, fault=fault, outcome=outcome, ok=ok, seconds=seconds))


def _found_by(error: str) -> str:
    if "tensors on the server differ" in error:
        return "found by digests of what is held"
    if "log-probs of the probe" in error:
        return "found by log-probs"
    if "begun and not finished" in error:
        return "found by an update that is still open"
    return "refused on receipt"


def inject(count: int, *, seed: int, folder: Path) -> list[Injection]:
    """`count` corruptions over each of the transports' receiving halves in this process, in turn, each with a clean sync.

    Nothing is written to `folder`. Half a minute for 1,000 on two cores.
    """
    return [
        one
        for kind in ("ludic_shm", "ludic_nccl")
        for one in inject_in_process(count // 2, seed=seed, transport=kind)[0]
    ]


def inject_in_process(count: int, *, seed: int, transport: str) -> tuple[list[Injection], list[WeightSyncReport]]:
    rng = random.Random(f"{transport} {seed}")
    policy = small_model(1)
    prepare_packed_attention(policy)
    dtype = torch.float32 if transport == "ludic_shm" else torch.bfloat16
    server = ModelServer(small_model(2, dtype=dtype))
    on_the_way: list[tuple[str, str]] = (
        [("file", kind) for kind in FILE_KINDS]
        if transport == "ludic_shm"
        else [("bytes", kind) for kind in BYTE_KINDS]
    )
    kinds = [*on_the_way, *(("held", kind) for kind in HELD_KINDS)]
    with server.linked():
        trial = Trial(policy=policy, sync=_weight_sync(server, transport, dtype), rng=rng)
        trial.once(CLEAN)
        buckets = len(server._receivers[0].layout.buckets) if server._receivers else 0
        for number in range(count):
            where, kind = kinds[number % len(kinds)]
            before = {name: parameter.detach().clone() for name, parameter in server.model.named_parameters()}
            if where == "file":
                server.on_file.append(functools.partial(damage_file, kind, rng))
            elif where == "bytes":
                server.on_bytes.append(damage_bytes(kind, rng, buckets))
            else:
                server.on_received.append(functools.partial(damage_model, kind, rng, before))
            trial.once(f"{where}: {kind}")
            for damages in (server.on_file, server.on_bytes, server.on_received):
                damages.clear()
            trial.once(CLEAN)
        trial.sync.close()
    return trial.injections, trial.reports


def _weight_sync(control: ServerControl, transport: str, dtype: torch.dtype) -> WeightSync:
    return WeightSync(
        control, transport=transport, served_model="policy", dtype=dtype, probe_token_ids=PROBE, deadline_s=120.0
    )


# -- a real server ---------------------------------------------------------------------------------------------------------


class DamagingControl(ServerControl):
    """A real server's routes, with damage on the way to it and, through `weight_hooks`, in it."""

    plan: list[tuple[str, str, random.Random]]
    """Where, which kind; at most one."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        for where, kind, rng in self.plan:
            if where == "file":
                damage_file(kind, rng, update_info)
            elif where == "held":
                self._rpc("damage_remember")
        super().update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        if any(kind == "never finished" for _, kind, _ in self.plan):
            return
        super().finish_weight_update(weight_version)
        for where, kind, rng in self.plan:
            if where == "held":
                self._rpc("damage", kind, str(rng.getrandbits(60)))

    def _rpc(self, method: str, *args: str) -> None:
        self.request("POST", "/collective_rpc", json_body={"method": method, "args": list(args)})


def inject_into_server(
    count: int, *, seed: int, base_url: str, model: Path, dtype: torch.dtype = torch.float32
) -> tuple[list[Injection], list[WeightSyncReport]]:
    """The same against a real server of `model` whose worker extension is `SERVER_EXTENSION`, over shared memory."""
    from transformers import AutoModelForCausalLM

    rng = random.Random(f"server {seed}")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prepare_packed_attention(policy)
    control = DamagingControl(base_url)
    control.plan = []
    sync = WeightSync(
        control, transport="ludic_shm", served_model=str(model), dtype=dtype, probe_token_ids=PROBE, deadline_s=120.0
    )
    trial = Trial(policy=policy, sync=sync, rng=rng)
    trial.once(CLEAN)
    kinds = [
        *(("held", kind) for kind in HELD_KINDS),
        *(("file", kind) for kind in FILE_KINDS),
        ("update", "never finished"),
    ]
    for number in range(count):
        where, kind = kinds[number % len(kinds)]
        control.plan.append((where, kind, rng))
        trial.once(f"server, {where}: {kind}")
        control.plan.clear()
        trial.once(CLEAN)
    trial.sync.close()
    return trial.injections, trial.reports


@contextlib.contextmanager
def damaging_server(model: Path, log_path: Path, *, dtype: str = "float32") -> Iterator[str]:
    """A real server on the CPU whose weights can be damaged; its address."""
    from ludic.inference.client.server_process import start_server

    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    args = [*CPU_SERVER_ARGS, "--dtype", dtype, "--worker-extension-cls", SERVER_EXTENSION]
    with start_server(str(model), extra_args=args, log_path=log_path, timeout_s=600, env=env) as server:
        yield server.base_url


# -- the tables ------------------------------------------------------------------------------------------------------------


def kinds_table(injections: Sequence[Injection]) -> str:
    """A line a kind of fault: how many, how many as promised, and how they were found."""
    lines = []
    for fault in dict.fromkeys(one.fault for one in injections):
        ours = [one for one in injections if one.fault == fault]
        outcomes = ", ".join(f"{outcome} {number}" for outcome, number in Counter(one.outcome for one in ours).items())
        lines.append(f"{fault:<42} {sum(one.ok for one in ours):>5} of {len(ours):>5}   {outcomes}")
    faults = [one for one in injections if one.fault != CLEAN]
    clean = [one for one in injections if one.fault == CLEAN]
    lines.append(
        f"found: {sum(one.ok for one in faults)} of {len(faults)}; "
        f"false alarms: {sum(not one.ok for one in clean)} of {len(clean)} clean syncs"
    )
    return "\n".join(lines)


def cost_words(reports: Sequence[WeightSyncReport]) -> str:
    """The share of the proof in the seconds of clean syncs, by phase, without those that opened a conversation."""
    steady = [report for report in reports if "open" not in report.phases_s] or list(reports)
    total = sum(report.seconds for report in steady)
    shares = {name: sum(report.phases_s.get(name, 0.0) for report in steady) / total for name in PROOF_PHASES}
    words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return f"{len(steady)} syncs of {total / len(steady):.4f} s on average; of these {words}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="corruptions in all (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="corrupt a real server of this model instead")
    parser.add_argument("--dtype", default="float32", help="of the real server (default: float32)")
    args = parser.parse_args(argv)
    parts: dict[str, tuple[list[Injection], list[WeightSyncReport]]] = {}
    if args.model is None:
        for transport in ("ludic_shm", "ludic_nccl"):
            parts[transport] = inject_in_process(args.count // 2, seed=args.seed, transport=transport)
    else:
        with (
            tempfile.TemporaryDirectory() as folder,
            damaging_server(args.model, Path(folder) / "server.log", dtype=args.dtype) as base_url,
        ):
            parts["a real server on the CPU"] = inject_into_server(
                args.count, seed=args.seed, base_url=base_url, model=args.model, dtype=getattr(torch, args.dtype)
            )
    for name, (injections, reports) in parts.items():
        sys.stdout.write(f"{name}\n{kinds_table(injections)}\n{cost_words(reports)}\n{reports[-1].proof}\n\n")
    return int(not all(one.ok for injections, _ in parts.values() for one in injections))


if __name__ == "__main__":
    sys.exit(main())

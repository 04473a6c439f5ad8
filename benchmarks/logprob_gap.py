"""What the log-prob gap between trainer and server is made of, for a real model on one GPU: one table, in nats a token.

    PYTHONPATH=src:. python benchmarks/logprob_gap.py --model DIR --dataset DIR --out OUT
    ... --device cpu --prompts 4 --samples 2 --max-tokens 24                                  to test it, beside the CPU server

ludic's server samples completions in bf16, once with its LM head's logits in bf16 and once in fp32, and then scores what it
sampled as a prompt (prefill). The trainer scores the same tokens: as it trains, and with one part at a time in fp32. All of
it is compared with the same reference, a plain transformers forward of each sequence by itself in fp32, on the same bf16
weights: what would be computed without rounding. A row's difference from the row above it is that part's share.

Parts of the trainer: the head's product; RoPE (angles and rotation); attention (scores, softmax and weighted sum); and what
is left, the linear layers and the residual stream. The kernel row computes attention by torch's sdpa, a segment at a time, in
the place of the variable-length kernel. What an fp32 head costs the server is timed on the same prompts, one server after the
other. Left out: which linear layer, and quantised servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Record, machine, markdown_table, records_of, say, write_report
from benchmarks.processes import ludic_server, required, run_and_write, serving
from ludic.types import Completion, SamplingParams, TrainingSample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HEADS = ("bfloat16", "float32")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model with a chat template (needed unless --table)")
    parser.add_argument("--dataset", type=Path, help="folder with GSM8K's train.jsonl (needed unless --table)")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of logs, records and table")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--prompts", type=int, default=64, help="default: 64")
    parser.add_argument("--samples", type=int, default=4, help="completions of each prompt (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a completion (default: 256)")
    parser.add_argument("--repeats", type=int, default=5, help="timed generations of all of them (default: 5)")
    parser.add_argument(
        "--gpu-share", type=float, default=0.3, help="of the GPU's memory for the server (default: 0.3)"
    )
    parser.add_argument("--start-deadline", type=float, default=300.0, help="seconds for a server (default: 300)")
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    parser.set_defaults(name="logprob_gap")
    return parser


# -- the server's side -----------------------------------------------------------------------------------------------------


async def sample(args: argparse.Namespace, base_url: str) -> tuple[list[Record], float]:
    """Sequences that the server sampled: prompt and completion ids, with its log-probs while it decoded and as a prompt; and
    its median tokens a second while it samples as many again, seeds apart."""
    from environments.gsm8k import GSM8K, load
    from ludic.inference.client.vllm_client import VLLMEngine
    from ludic.task.prompts import encode_prompt, load_tokenizer

    tokenizer, environment = load_tokenizer(args.model), GSM8K()
    problems = load("train", dataset=args.dataset, limit=args.prompts)
    prompts = [encode_prompt(tokenizer, environment.messages(problem)) for problem in problems]
    engine = VLLMEngine(base_url, model=str(args.model))
    sampling = SamplingParams(temperature=1.0, max_tokens=args.max_tokens, logprobs=True)
    sequences = []
    async with contextlib.aclosing(engine):
        await engine.connect(tokenizer)

        async def all_groups() -> list[list[Completion]]:
            jobs = (engine.generate(prompt, num_completions=args.samples, sampling=sampling) for prompt in prompts)
            return await asyncio.gather(*jobs)

        groups = await all_groups()  # the first has compilation and an empty prefix cache in it
        speeds = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            again = await all_groups()
            tokens = sum(len(completion.token_ids) for group in again for completion in group)
            speeds.append(tokens / (time.perf_counter() - started))
        for prompt, completions in zip(prompts, groups, strict=True):
            for completion in completions:
                assert completion.logprobs is not None
                ids = [*prompt, *completion.token_ids]
                # A salt of its own: a part that comes from the cache was computed while it decoded.
                prefill = engine.control.prompt_logprobs(str(args.model), ids, cache_salt=f"{time.monotonic_ns()}")
                sequences.append(
                    {"prompt": prompt, "completion": completion.token_ids, "decode": completion.logprobs,
                     "prefill": prefill[len(prompt) - 1 :]}
                )  # fmt: skip
    await environment.aclose()
    return sequences, statistics.median(speeds)


def sampled(args: argparse.Namespace, head: str) -> tuple[list[Record], float]:
    """What a server with this precision of its head sampled, and its tokens a second."""
    from ludic.task.pretrained import load_config

    context = min(load_config(args.model).get_text_config().max_position_embeddings, 2048)
    settings: dict[str, Any] = {"max_model_len": context, "dtype": "bfloat16"}
    settings["hf_overrides"] = json.dumps({"head_dtype": head})
    settings |= (
        {"enforce_eager": True, "max_num_seqs": 32}
        if args.device == "cpu"
        else {"gpu_memory_utilization": args.gpu_share, "weight_transfer_config": '{"backend": "ludic_shm"}'}
    )
    gpu = None if args.device == "cpu" else 0
    spec = ludic_server(args.model, settings, gpu=gpu, name=head)
    with serving([spec], log_dir=args.out, deadline_s=args.start_deadline) as servers:
        return asyncio.run(sample(args, required(servers, head)))


# -- the trainer's side ----------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    """The model's weights rounded to bf16, as the server has them, to be computed with in `dtype`."""
    import torch

    from ludic.task.pretrained import load_model
    from ludic.train.master_weights import cast_parameters

    model = load_model(args.model, dtype=torch.float32)
    cast_parameters(model, torch.bfloat16)
    cast_parameters(model, dtype)
    torch.nn.Module.to(model, args.device)
    model.requires_grad_(False).eval()
    return model


def reference(model: PreTrainedModel, sequences: Sequence[Record]) -> list[torch.Tensor]:
    """[C] of each completion: one plain forward a sequence, in the model's dtype."""
    import torch

    with torch.no_grad():
        found = []
        for one in sequences:
            ids = torch.tensor([*one["prompt"], *one["completion"]], device=model.device)
            logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, len(one["prompt"]) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, ids[len(one["prompt"]) :, None]).squeeze(1).cpu())
        return found


def trained(model: PreTrainedModel, sequences: Sequence[Record], *, fp32_head: bool) -> list[torch.Tensor]:
    """[C] of each completion: packed, as the trainer computes it."""
    import torch

    from ludic.train.logprobs import token_logprobs
    from ludic.train.packing import pack

    with torch.no_grad():
        samples = [
            TrainingSample(
                token_ids=[*one["prompt"], *one["completion"]],
                loss_mask=[False] * len(one["prompt"]) + [True] * len(one["completion"]),
                rollout_logprobs=None,
                advantage=1.0,
            )
            for one in sequences
        ]
        found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
        budget = max(8192, *(len(one.token_ids) for one in samples))
        for row in pack(samples, token_budget=budget, normalisation="token_mean"):
            logprobs = token_logprobs(
                model, row.to(model.device), temperature=1.0, with_entropy=False, fp32_head=fp32_head
            ).logprobs.cpu()
            for index, part in zip(row.sample_indices, logprobs.split(row.cu_seqlens.diff().tolist()), strict=True):
                if index >= 0:
                    found[index] = part[-len(sequences[index]["completion"]) :]
        return found


@contextlib.contextmanager
def in_fp32(model: PreTrainedModel, *, rope: bool, attention: bool, kernel: bool = True) -> Iterator[None]:
    """Compute RoPE, or attention, of a prepared bf16 model in fp32; without `kernel`, attention by sdpa in any case.

    Rotating bf16 queries by fp32 angles gives fp32 queries. They are rounded before attention unless that is in fp32 too.
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from ludic.train import attention as packed

    def wide(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].float(), *args[1:])

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        dtype = torch.float32 if attention else value.dtype
        states, none = packed.packed_attention(module, query.to(dtype), key.to(dtype), value.to(dtype), mask, **kwargs)
        return states.to(value.dtype), none

    varlen_can = packed._varlen_can
    hooks = [
        module.register_forward_pre_hook(wide)
        for module in model.modules()
        if rope and type(module).__name__.endswith("RotaryEmbedding")
    ]
    if rope and not hooks:
        raise ValueError(f"{type(model).__name__} has no module of RoPE that could be put in fp32")
    ALL_ATTENTION_FUNCTIONS.register(packed.ATTENTION_NAME, attend)
    if not kernel:
        packed._varlen_can = lambda *_: False
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        ALL_ATTENTION_FUNCTIONS.register(packed.ATTENTION_NAME, packed.packed_attention)
        packed._varlen_can = varlen_can


# -- the measurement -------------------------------------------------------------------------------------------------------


def difference(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Record:
    """Of two sides' log-probs [C] of each completion: mean, 99th percentile and largest |difference|, and the mean sign."""
    import torch

    gaps = torch.cat(list(ones)).double() - torch.cat(list(others)).double()
    size = gaps.abs()
    return {
        "mean": size.mean().item(),
        "p99": size.quantile(0.99).item() if len(size) < 2**24 else None,
        "max": size.max().item(),
        "bias": gaps.mean().item(),
        "tokens": len(size),
    }


def measure(args: argparse.Namespace) -> None:
    import torch

    from ludic.train.attention import prepare_packed_attention

    if args.model is None or args.dataset is None:
        raise ValueError("--model and --dataset are needed: a model's folder, and one with GSM8K's train.jsonl")
    records = records_of(args)
    records.add("machine", **machine())
    rows: list[Record] = []

    def row(side: str, what: str, ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
        rows.append({"side": side, "what": what, **difference(ones, others)})
        say(f"{side}: {what}: {rows[-1]['mean']:.3g} nats a token")

    served = {head: sampled(args, head) for head in HEADS}
    sides = {head: sequences for head, (sequences, _) in served.items()}
    exact_model = load(args, torch.float32)
    exact = {head: reference(exact_model, sequences) for head, sequences in sides.items()}
    theirs = {
        head: {way: [torch.tensor(one[way]) for one in sequences] for way in ("decode", "prefill")}
        for head, sequences in sides.items()
    }
    for head in HEADS:
        row("server", f"decode, logits in {head}", theirs[head]["decode"], exact[head])
        row("server", f"prefill, logits in {head}", theirs[head]["prefill"], exact[head])
        row("server", f"decode against prefill, logits in {head}", theirs[head]["decode"], theirs[head]["prefill"])
    prepare_packed_attention(exact_model)
    fixed, right = sides["bfloat16"], exact["bfloat16"]
    row("trainer", "packed, everything in fp32", trained(exact_model, fixed, fp32_head=True), right)
    del exact_model
    model = load(args, torch.bfloat16)
    row("trainer", "plain transformers in bf16", reference(model, fixed), right)
    prepare_packed_attention(model)
    steps: list[tuple[str, dict[str, bool], dict[str, bool]]] = [
        ("as it trains, logits in bf16", {"fp32_head": False}, {}),
        ("as it trains, logits in fp32", {"fp32_head": True}, {}),
        ("and RoPE in fp32", {"fp32_head": True}, {"rope": True}),
        ("and attention in fp32: linear layers and residuals are left", {"fp32_head": True}, {"rope": True, "attention": True}),
    ]  # fmt: skip
    if args.device == "cuda":
        steps.insert(2, ("and attention by sdpa, not the kernel", {"fp32_head": True}, {"kernel": False}))
    ours = {}
    for what, settings, parts in steps:
        with in_fp32(model, **{"rope": False, "attention": False, **parts}):
            ours[what] = trained(model, fixed, **settings)
        row("trainer", what, ours[what], right)
    row("trainer against server", "logits in bf16 on both sides", ours[steps[0][0]], theirs["bfloat16"]["decode"])
    mixed = "logits in fp32 here, in bf16 there"
    row("trainer against server", mixed, ours[steps[1][0]], theirs["bfloat16"]["decode"])
    both = trained(model, sides["float32"], fp32_head=True)
    row("trainer against server", "logits in fp32 on both sides", both, theirs["float32"]["decode"])
    speeds = {head: speed for head, (_, speed) in served.items()}
    records.add("logprob_gap", rows=rows, model=args.model.name, samples=len(fixed), tokens_per_second=speeds)


def write_table(args: argparse.Namespace) -> None:
    found = records_of(args).last()
    if "logprob_gap" not in found:
        return
    headers = ["nats a token", "mean", "99%", "largest", "mean with sign", "tokens"]
    sections = []
    for side, against in (
        ("server", "against the fp32 reference, on what it sampled"),
        ("trainer", "against the fp32 reference, on what the server with logits in bf16 sampled"),
        ("trainer against server", "as a run sees it"),
    ):
        cells = [
            [one["what"], *(one[name] for name in ("mean", "p99", "max", "bias", "tokens"))]
            for one in found["logprob_gap"]["rows"]
            if one["side"] == side
        ]
        sections.append(f"{side[0].upper()}{side[1:]}, {against}:\n\n{markdown_table(headers, cells)}")
    speeds = found["logprob_gap"]["tokens_per_second"]
    speed_rows = [[f"logits in {head}", speeds[head], speeds[head] / speeds[HEADS[0]]] for head in HEADS]
    sections.append(f"The server's speed:\n\n{markdown_table(['', 'tokens/s', 'ratio'], speed_rows)}")
    title = f"The log-prob gap of {found['logprob_gap']['model']}, {found['logprob_gap']['samples']} completions"
    write_report(args.out / "logprob_gap.md", title, found["machine"], sections)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return run_and_write(args, lambda: measure(args), write_table)


if __name__ == "__main__":
    sys.exit(main())

"""Which model families ludic trains against vLLM with proof: a small random model of each, one server each, one table.

    PYTHONPATH=src:. python benchmarks/families.py --out OUT
    ... --families llama,mixtral                                                                          only these

All figures are the largest difference over the tokens, in nats; everything is in float32 on the CPU.

- packing: the trainer's packed row against plain transformers, each sequence by itself, at lengths beyond the window.
- local engine: the log-probs of completions that it drew against plain transformers.
- at start: a vLLM server that has just loaded the saved model against the trainer, on one prompt.
- sync: the same after a proven sync of other weights; and how many of the tensors were compared by digests.
- reload: the same after the first weights were sent again, so that what a reload leaves stale is seen.

A family that a part refuses has the refusal under the table. Left out: real weights, GPUs and bf16, where kernels round
(`logprob_gap.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Record, machine, markdown_table, records_of, say, write_report
from benchmarks.logprob_gap import reference, trained
from benchmarks.make_policy import build_tokenizer
from benchmarks.processes import PartError, ludic_server, required, run_and_write, serving
from ludic.rollout.engine import PolicyWeights
from ludic.rollout.errors import EngineError
from ludic.types import SamplingParams

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ludic.inference.client.vllm_client import VLLMEngine

CONTEXT = 256
WINDOW = 16
PROBE = [(7 * place * place + 3) % 500 + 5 for place in range(64)]
"""Longer than the window."""
SHAPE: Record = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32",
}  # fmt: skip
_GPT2: Record = {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 1024, "tie_word_embeddings": True}
_TIED: Record = {"tie_word_embeddings": True}  # vLLM has no other
_EXPERTS: Record = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, Record] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {**_TIED, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "gpt_neox": {"num_key_value_heads": 2},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {
        "num_local_experts": 4,
        "attention_bias": True,
        "lm_head_bias": True,
        "architectures": ["PhiMoEForCausalLM"],
    },  # as the hub and vLLM spell it
    "qwen3_moe": _EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "gpt2": _GPT2,
    "glm4": {},
    "cohere2": {
        **_TIED,
        "logit_scale": 0.5,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {**_TIED, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
}
"""transformers' names of model types, and the settings in which each differs from `SHAPE`."""
FIGURES = ("packing", "local engine", "at start", "sync", "reload")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="model types, with commas (default: all)")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of models, logs, records and table")
    parser.add_argument("--no-server", action="store_true", help="only packing and the local engine: a minute for all")
    parser.add_argument("--start-deadline", type=float, default=300.0, help="seconds for a server (default: 300)")
    parser.add_argument("--table", action="store_true", help="only write the table of the records that OUT holds")
    parser.set_defaults(name="families")
    return parser


# -- the models ------------------------------------------------------------------------------------------------------------


def random_model(family: str, *, seed: int) -> PreTrainedModel:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE | FAMILIES[family]))
    draw_weights(model, seed=seed)
    model.requires_grad_(False).eval()
    return model


def draw_weights(model: PreTrainedModel, *, seed: int) -> None:
    """Larger than an initialisation's, so that a stale or a misplaced tensor is seen in the log-probs."""
    import torch

    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(
                    noise * (0.3 if "embed" in name or "head" in name else 1.0 / math.sqrt(parameter.shape[-1]))
                )
            else:
                parameter.add_(noise * 0.05)


def largest(ones: Sequence[Sequence[float]], others: Sequence[torch.Tensor]) -> float:
    import torch

    return max(float((torch.tensor(one) - other).abs().max()) for one, other in zip(ones, others, strict=True))


# -- the parts -------------------------------------------------------------------------------------------------------------


def packing(family: str) -> float:
    """Of sequences longer than the window, two of which share a prompt."""
    from ludic.train.attention import prepare_packed_attention

    sequences = [
        {"prompt": PROBE[:20], "completion": PROBE[20:50]},
        {"prompt": PROBE[:20], "completion": PROBE[30:]},
        {"prompt": PROBE[40:43], "completion": PROBE[3:9]},
    ]
    model = random_model(family, seed=0)
    alone = reference(model, sequences)
    prepare_packed_attention(model)
    return largest([one.tolist() for one in trained(model, sequences, fp32_head=True)], alone)


async def local_engine(family: str) -> float:
    from ludic.rollout.local import LocalEngine

    model = random_model(family, seed=0)
    sampling = SamplingParams(max_tokens=24, seed=1)
    async with contextlib.aclosing(LocalEngine(model, eos_token_ids=[])) as engine:
        prompts = [PROBE[:30], PROBE[:5]]
        groups = await asyncio.gather(
            *(engine.generate(prompt, num_completions=2, sampling=sampling) for prompt in prompts)
        )
    drawn = [(prompt, one) for prompt, group in zip(prompts, groups, strict=True) for one in group]
    sequences = [{"prompt": prompt, "completion": one.token_ids} for prompt, one in drawn]
    return largest([one.logprobs or [] for _, one in drawn], reference(model, sequences))


def of_probe(model: PreTrainedModel) -> torch.Tensor:
    (logprobs,) = reference(model, [{"prompt": PROBE[:1], "completion": PROBE[1:]}])
    return logprobs


def of_server(engine: VLLMEngine, model: Path) -> list[float]:
    return engine.control.prompt_logprobs(str(model), PROBE, cache_salt=f"{time.monotonic_ns()}")


async def synced(family: str, folder: Path, base_url: str, row: Record) -> None:
    """Fill in the figures of the server; raises where a sync was refused or not proven."""
    from ludic.inference.client.vllm_client import VLLMEngine
    from ludic.task.prompts import load_tokenizer
    from ludic.train.attention import prepare_packed_attention

    first, second = random_model(family, seed=0), random_model(family, seed=1)
    wanted = {"at start": of_probe(first), "sync": of_probe(second), "reload": of_probe(first)}
    async with contextlib.aclosing(VLLMEngine(base_url, model=str(folder))) as engine:
        await engine.connect(load_tokenizer(folder))
        row["at start"] = largest([of_server(engine, folder)], [wanted["at start"]])
        await engine.enable_weight_sync(PROBE)
        for version, (name, model) in enumerate((("sync", second), ("reload", first)), 1):
            prepare_packed_attention(model)
            report = await engine.update_weights(PolicyWeights(model, version))
            row[name] = largest([of_server(engine, folder)], [wanted[name]])
            row["proof"] = report.proof


def measure_family(args: argparse.Namespace, family: str) -> Record:
    import torch

    from ludic.train.model_folder import save_model

    row: Record = {"family": family, "refused": {}}

    def part(name: str, run: Callable[[], Any]) -> None:
        try:
            found = run()
        except (ValueError, EngineError, PartError) as error:
            row["refused"][name] = " ".join(str(error).split())
        else:
            if found is not None:
                row[name] = found

    part("packing", lambda: packing(family))
    part("local engine", lambda: asyncio.run(local_engine(family)))
    if args.no_server:
        return row
    folder = args.out / "models" / family
    model = random_model(family, seed=0)
    save_model(folder, model, model.state_dict(), torch.float32)
    build_tokenizer([], SHAPE["vocab_size"]).save_pretrained(folder)
    settings = {"max_model_len": CONTEXT, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
    spec = ludic_server(folder, settings, gpu=None, name=family)
    with serving([spec], log_dir=args.out, deadline_s=args.start_deadline) as servers:
        part("server", lambda: asyncio.run(synced(family, folder, required(servers, family), row)))
    return row


# -- the table -------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    families = [name for name in args.families.split(",") if name]
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"--families {args.families}: choose from {', '.join(FAMILIES)}")
    records = records_of(args)
    records.add("machine", **machine())
    for family in families:
        row = measure_family(args, family)
        records.add(family, **row)
        say(f"{family}: " + ", ".join(f"{name} {row.get(name, math.nan):.2g}" for name in FIGURES))


def write_table(args: argparse.Namespace) -> None:
    found = records_of(args).last()
    rows = [found[family] for family in FAMILIES if family in found]
    if not rows:
        return
    cells = [
        [
            row["family"],
            *(row.get(name) for name in FIGURES),
            row.get("proof", "").partition("; ")[2].partition(" held")[0],
        ]
        for row in rows
    ]
    refusals = [f"- {row['family']}, {name}: {reason}" for row in rows for name, reason in row["refused"].items()]
    sections = [markdown_table(["family", *FIGURES, "compared by digests"], cells), "\n".join(refusals)]
    title = "Model families, largest difference in nats a token"
    write_report(args.out / "families.md", title, found["machine"], [one for one in sections if one])


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    return run_and_write(args, lambda: measure(args), write_table)


if __name__ == "__main__":
    sys.exit(main())

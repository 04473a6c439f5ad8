"""Several ranks train what one trains: real process groups over gloo on the CPU, computed once by `ranks_checks`."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from ludic.commands import given_command
from ludic.config import GRPOConfig
from ludic.run.ranks import check_architecture, check_rank_arguments, check_same
from ludic.train.dealing import deal, empty_row
from ludic.train.fingerprint import bit_sums
from ludic.train.packing import pack
from ludic.train.ranks import Ranks
from ludic.train.shards import rows_of
from ludic.types import MicroBatch, TrainingSample
from tests.ranks_checks import FAULTS, WORLDS

WORLD_CASES = [(world, case) for world, cases in WORLDS.items() for case in cases]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ranks") / "checked.json"
    words = [sys.executable, "-m", "tests.ranks_checks", str(out)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=root, env=environment)
    assert out.exists(), done.stderr[-3000:]
    answers: dict[str, Any] = json.loads(out.read_text())
    return answers


@pytest.mark.parametrize(("world", "case"), WORLD_CASES)
def test_ranks_have_the_gradient_of_one_process(checked: dict[str, Any], world: int, case: str) -> None:
    alone, shared = checked["1"][case], checked[str(world)][case]
    for update in ("first", "second"):  # the second has fewer sequences than ranks
        assert shared[update]["gradient"] == pytest.approx(alone[update]["gradient"], rel=1e-5, abs=1e-5)
    assert max(map(abs, alone["first"]["gradient"])) > 1e-3


@pytest.mark.parametrize("case", ["decayed", "sharded decayed"])
def test_ranks_step_as_one_process_does_with_a_clipped_norm_and_weight_decay(
    checked: dict[str, Any], case: str
) -> None:
    for update in ("first", "second"):
        alone, shared = (torch.tensor(checked[world][case][update]["masters"]) for world in ("1", "2"))
        # AdamW's first steps are as large for a gradient of rounding errors as for any other: those weights may differ.
        assert float(((alone - shared).abs() > 1e-5).float().mean()) < 0.02


@pytest.mark.parametrize(("world", "case"), WORLD_CASES)
def test_ranks_log_what_one_process_logs(checked: dict[str, Any], world: int, case: str) -> None:
    alone, shared = checked["1"][case]["figures"], checked[str(world)][case]["figures"]
    assert shared.keys() == alone.keys()
    cut = ("micro_batches", "forwarded_tokens")  # how the work was cut, and a shared prompt that was repeated for it
    for name in shared.keys() - set(cut):
        assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=2e-5), name


def test_an_engine_is_sent_the_masters_of_all_ranks(checked: dict[str, Any]) -> None:
    for world, case in WORLD_CASES:
        for update in ("first", "second"):
            assert checked[str(world)][case][update]["sent"] == checked[str(world)][case][update]["masters"]


@pytest.mark.parametrize("case", ["grpo", "sharded"])
def test_ranks_that_compute_in_bf16_keep_fp32_masters_and_send_them_rounded(checked: dict[str, Any], case: str) -> None:
    bf16 = checked["bf16"][case]
    assert bf16["dtypes"] == ["torch.float32", "torch.bfloat16"]
    masters, sent = (torch.tensor(bf16["first"][name]) for name in ("masters", "sent"))
    assert torch.equal(masters.bfloat16().float(), sent) and not torch.equal(masters, sent)
    gradient, exact = (torch.tensor(one["first"]["gradient"]) for one in (bf16, checked["1"][case]))
    assert float((gradient - exact).norm() / exact.norm()) < 0.1


def test_three_ranks_take_up_the_optimizer_that_one_process_saved(checked: dict[str, Any]) -> None:
    assert checked["moments of 3 ranks"] == [checked["moments"]] * 2


def test_damaged_weights_are_a_matter_of_the_run_and_no_failure_of_another_rank(checked: dict[str, Any]) -> None:
    damaged = checked["damaged"]
    assert "not finite" in damaged["error"] and damaged["failure"] is None
    assert damaged["tensors"] > 0  # the others were still there to be asked


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_rank_ends_rank_0_with_a_line_that_names_the_rank(checked: dict[str, Any], name: str) -> None:
    (said,) = checked["faults"][name]["answer"].values()
    assert "rank 1: broken on purpose" in said if name == "raised" else "rank 1 was lost" in said
    assert len(said.strip().splitlines()) == 1


def test_ranks_with_other_flags_end_with_one_line_that_names_the_flag(checked: dict[str, Any]) -> None:
    first, other = checked["script"]["disagree"]
    assert first["printed"].strip() == (
        "train_gsm8k.py: error: --seed is not given on rank 0 and 7 on rank 1: start all ranks with the same flags and packages"
    )
    assert (first["code"], other["printed"]) == (2, "")


def test_more_ranks_than_sequences_of_an_update_are_refused(checked: dict[str, Any]) -> None:
    first, *others = checked["script"]["too many"]
    assert first["printed"].startswith(
        "train_gsm8k.py: error: 3 ranks for --rollouts-per-update 2: some would never have"
    )
    assert [first["code"], *(other["printed"] for other in others)] == [2, "", ""]


def test_a_run_of_two_ranks_that_three_continue_after_a_restart_trains_what_one_process_trains(
    checked: dict[str, Any],
) -> None:
    runs = checked["script"]
    assert [one["code"] for name in ("alone", "shared", "resumed") for one in runs[name]] == [0] * 6
    assert "torchrun has started this run again (1): continuing it" in runs["resumed"][0]["printed"]
    assert "the whole run: 3 updates, 48 rollouts" in runs["resumed"][0]["printed"]
    alone, shared = runs["weights"]
    assert shared == pytest.approx(alone, rel=0, abs=1e-3)  # three updates move a weight by up to 9e-3


def test_ranks_other_than_the_first_print_nothing(checked: dict[str, Any]) -> None:
    assert not any(one["printed"] for name in ("shared", "resumed") for one in checked["script"][name][1:])


def test_torchrun_starts_a_run_of_two_ranks(digit_policy_dir: Path, digit_problems: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("examples/gsm8k/train_gsm8k.py", "--engine", "local", "--model", str(digit_policy_dir)),
        *("--dataset", str(digit_problems / "train.jsonl"), "--train-steps", "3", "--rollouts-per-update", "32"),
        *("--max-tokens", "14", "--logger", "none", "--out-dir", str(tmp_path)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("3 updates, 96 rollouts") == 1
    assert (tmp_path / "checkpoints_gsm8k/step_3/manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard-weights", "--turns", "2"]])
def test_the_benchmark_of_ranks_prints_the_tokens_a_second_of_both_sides_their_ratio_and_their_parts(
    flags: list[str],
) -> None:
    root = Path(__file__).parents[1]
    flags = [*flags, "--shape", "tiny", "--sequences", "8", "16", "--updates", "1", "--budget", "1024"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
    words = [sys.executable, "benchmarks/ranks.py", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=root, env=environment, check=True)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line[:1] == "|"
    ]
    assert [row[:2] for row in rows] == [["8", "1"], ["8", "2"], ["16", "1"], ["16", "2"]]
    one, two = (float(row[2].replace(",", "")) for row in rows[2:])
    assert float(rows[3][3]) == pytest.approx(two / one, abs=0.01)
    rows_s = header.index("rows, s")
    assert all(float(row[rows_s]) > 0 for row in rows), "forward and backward were found on both sides"


# -- dealing, and what needs no process group ---------------------------------------------------------------------------


def samples(*lengths: int) -> list[TrainingSample]:
    return [
        TrainingSample(
            token_ids=[3 + number] * length,
            loss_mask=[False] + [True] * (length - 1),
            rollout_logprobs=None,
            advantage=1.0,
        )
        for number, length in enumerate(lengths)
    ]


def dealt(lengths: tuple[int, ...], num_ranks: int, token_budget: int = 100) -> list[list[MicroBatch]]:
    return deal(
        lambda budget: pack(samples(*lengths), token_budget=budget, normalisation="token_mean", scale=1.0),
        longest=max(lengths),
        token_budget=token_budget,
        num_ranks=num_ranks,
        empty=empty_row(1, share_prompts=True, with_logprobs=False),
    )


def test_rows_that_do_not_come_out_even_are_packed_into_shorter_ones_that_do() -> None:
    rounds = dealt((20,) * 12, 2)  # 240 tokens: three rows of 80 for one process
    assert [[row.num_sequence_tokens for row in one] for one in rounds] == [[60, 60], [60, 60]]


def test_every_sequence_is_dealt_once_and_every_round_has_a_row_for_each_rank() -> None:
    lengths = (31, 7, 55, 12, 90, 44, 18, 3, 29, 61, 5)
    for num_ranks in (1, 2, 3, 4, 8):
        rounds = dealt(lengths, num_ranks)
        assert {len(one) for one in rounds} == {num_ranks}
        indices = [index for one in rounds for row in one for index in row.sample_indices if row.num_loss_tokens]
        assert sorted(index for index in indices if index >= 0) == list(range(len(lengths)))


def test_ranks_without_a_sequence_get_an_empty_row() -> None:
    ((first, *others),) = dealt((20,), 3)
    assert first.num_loss_tokens == 19
    assert all(row.num_loss_tokens == 0 and not row.loss_mask.any() for row in others)


def test_the_rows_of_a_parameter_are_cut_as_fsdp_cuts_them() -> None:
    for size in (1, 2, 5, 7, 8, 61):
        whole = torch.arange(size)
        for num_ranks in (1, 2, 4, 8):
            pieces = [whole[rows_of(whole.shape, rank, num_ranks)] for rank in range(num_ranks)]
            chunks = [*whole.chunk(num_ranks), *[whole[:0]] * num_ranks][:num_ranks]
            assert all(torch.equal(*pair) for pair in zip(pieces, chunks, strict=True))


def test_offloading_is_refused_where_there_is_one_process() -> None:
    with pytest.raises(ValueError, match="--cpu-offload is for several ranks: start them with torchrun"):
        check_rank_arguments(None, GRPOConfig(cpu_offload=True))  # type: ignore[arg-type]


def test_the_first_difference_between_ranks_is_named() -> None:
    check_same([{"torch": "2.14"}, {"torch": "2.14"}])
    with pytest.raises(ValueError, match=r"torch is 2\.14 on rank 0 and 2\.13 on rank 2"):
        check_same([{"torch": "2.14"}, {"torch": "2.14"}, {"torch": "2.13"}])


def test_a_fingerprint_of_weights_is_one_bits_and_does_not_depend_on_the_order_of_a_sum() -> None:
    layer = torch.nn.Linear(1000, 7)
    sums = bit_sums(layer)
    flat = [*layer.weight.detach().flatten().view(torch.int32).tolist()]
    assert sums == {"bias": sum(layer.bias.detach().view(torch.int32).tolist()), "weight": sum(reversed(flat))}
    with torch.no_grad():
        layer.weight.view(torch.int32)[3, 500] += 1  # the last bit of one weight
    assert bit_sums(layer) == {"bias": sums["bias"], "weight": sums["weight"] + 1}


@pytest.mark.parametrize(
    ("given", "launcher"),
    [
        ({}, "-m torch.distributed.run --standalone --nproc_per_node 4 train.py"),
        (
            {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run-1"},
            "-m torch.distributed.run --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --rdzv_id run-1 "
            "--nproc_per_node 2 train.py",
        ),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "--rdzv_id NAME --nproc_per_node 4 train.py"),
    ],
)
def test_the_command_that_is_printed_starts_as_many_ranks_which_find_each_other(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], launcher: str
) -> None:
    for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", **given}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert given_command("--resume", without=()).endswith(f"{launcher} --resume")


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        (MixtralConfig(num_local_experts=4), "num_local_experts 4"),
        (Qwen3MoeConfig(num_experts=8), "num_(local_)?experts 8"),
        (DeepseekV3Config(n_routed_experts=16), "n_routed_experts 16"),
        (Qwen2Config(), None),
    ],
)
def test_a_mixture_of_experts_is_refused_on_several_ranks_alone(
    monkeypatch: pytest.MonkeyPatch, model: PretrainedConfig, setting: str | None
) -> None:
    check_architecture("some/model", model)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if setting is None:
        check_architecture("some/model", model)
        return
    with pytest.raises(ValueError, match=rf"^some/model is a mixture of experts \({setting}\), which 2 ranks cannot"):
        check_architecture("some/model", model)


def test_a_rank_does_not_end_in_the_middle_of_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would end that thread within the store's C++, which ends the process by SIGABRT after a run without a fault."""
    monkeypatch.setattr("ludic.train.ranks.SIGN_S", 0.01)
    signs, giving = list[str](), threading.Event()

    class Store:
        def set(self, key: str, value: str) -> None:
            giving.set()
            time.sleep(0.2)
            signs.append(key)

        def check(self, keys: list[str]) -> bool:
            return False

    ranks = object.__new__(Ranks)
    ranks.rank, ranks.size, ranks._seen, ranks._lost_s = 0, 1, {}, 60.0
    store: Any = Store()
    ranks._store, ranks._closed = store, threading.Event()
    ranks._watching = threading.Thread(target=ranks._watch, daemon=True)
    ranks._watching.start()
    assert giving.wait(10)
    ranks.close()
    assert not ranks._watching.is_alive() and signs[-2:] == ["alive/0", "ended/0"]

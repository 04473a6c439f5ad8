"""The table of what ludic changes from vLLM's defaults: that it is whole, and what its values come from."""

import argparse
import json
from pathlib import Path

import pytest

from ludic.inference import vllm_server
from ludic.inference.server.server_defaults import (
    DEFAULTS,
    MAX_KV_CACHE_BYTES,
    MIN_KV_CACHE_BYTES,
    is_float32,
    kv_cache_bytes,
    markdown_table,
)


def test_the_kv_cache_of_a_cpu_server_leaves_room_for_the_rest() -> None:
    sizes = [kv_cache_bytes(free * 2**30) for free in (0, 1, 4, 23, 1000)]
    assert sizes == [MIN_KV_CACHE_BYTES, MIN_KV_CACHE_BYTES, 2**29, MAX_KV_CACHE_BYTES, MAX_KV_CACHE_BYTES]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, True),
        ({"torch_dtype": "float32"}, True),
        ({"text_config": {"dtype": "float32"}}, True),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float32"}}, False),
        ({"dtype": "bfloat16"}, False),
        ({"text_config": None}, False),
    ],
)
def test_a_folder_is_float32_if_its_config_says_so(config: object, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert is_float32(str(tmp_path)) is expected


def test_what_is_no_folder_with_a_config_is_left_to_vllm(tmp_path: Path) -> None:
    assert not is_float32("org/name") and not is_float32(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert not is_float32(str(tmp_path))


def test_each_row_is_in_the_table_of_the_documentation_once() -> None:
    rows = [line for line in markdown_table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(DEFAULTS) == len({row.setting for row in DEFAULTS})
    for row, line in zip(DEFAULTS, rows, strict=True):
        assert line == f"| `{row.setting}` | {row.vllm} | {row.ludic} | {row.why} |"


# --- held against vLLM's own parser, in its CPU build -----------------------------------------------------------------


def vllm_defaults(*argv: str) -> dict[str, object]:
    from vllm.entrypoints.cli.serve import FlexibleArgumentParser, make_arg_parser

    defaults: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args(list(argv))
    return vars(defaults)


def changed(argv: list[str]) -> set[str]:
    """The names whose value is another than vLLM's own parser gives for the same command line, ludic's flags aside."""
    own = ("--no-training", "--enable-log-stats")
    theirs = vllm_defaults(*(word for word in argv if word not in own))
    ours = vars(vllm_server.parse_arguments(argv))
    assert ours.keys() - theirs.keys() == {"no_training", "api_key_file", "server_engines"}
    return {name for name, value in theirs.items() if ours[name] != value}


def rows(*whens: str) -> set[str]:
    """The names of the table's rows; without `allowed_origins`, where 0.32, which is held against it, has ludic's value."""
    return {row.dest for row in DEFAULTS if row.when in whens and row.dest} - {"allowed_origins"}


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_the_settings_differ_from_vllms_by_the_rows_of_the_table_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    model = ["--model", str(tmp_path)]
    assert changed([]) == rows("always", "training", "cpu") - {"dtype"}  # a name on the hub
    assert changed(model) == rows("always", "training", "cpu") - {"model"}
    assert changed(["--no-training", *model]) == rows("always", "cpu") - {"model"}


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_the_words_of_the_table_for_vllms_defaults_are_vllms_defaults() -> None:
    theirs = vllm_defaults()
    words: dict[object, object] = {None: "none", "": "none", False: "off", True: "on"}
    in_other_words = {"host", "allowed_origins", "middleware", "kv_cache_memory_bytes", "max_model_len"}
    for row in DEFAULTS:
        if row.dest and row.dest not in in_other_words:
            value = theirs[row.dest]
            shown = json.dumps(value) if isinstance(value, dict) else words.get(value, value)
            assert row.vllm == shown, row.setting
    assert {name: theirs[name] for name in in_other_words} == {
        "host": None, "allowed_origins": [], "middleware": [], "kv_cache_memory_bytes": None, "max_model_len": None
    }  # fmt: skip
    assert theirs["gpu_memory_utilization"] == 0.92


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_what_the_user_gives_overrides_every_row(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    config = tmp_path / "settings.yaml"
    config.write_text("no-training: true\nmax-model-len: 512\n")
    given = [
        *("--host", "::1", "--allowed-origins", '["http://a"]', "--logprobs-mode", "raw_logits", "--dtype", "bfloat16"),
        *(
            "--generation-config",
            "auto",
            "--kv-cache-memory-bytes",
            "1G",
            "--no-enforce-eager",
            "--model",
            str(tmp_path),
        ),
    ]
    args = vllm_server.parse_arguments([*given, "--config", str(config)])
    assert (args.host, args.allowed_origins, args.logprobs_mode) == ("::1", ["http://a"], "raw_logits")
    assert (args.dtype, args.generation_config, args.enforce_eager) == ("bfloat16", "auto", False)
    assert (args.kv_cache_memory_bytes, args.max_model_len) == (2**30, 512)
    assert args.no_training and args.weight_transfer_config is None and args.worker_extension_cls == ""
    share: argparse.Namespace = vllm_server.parse_arguments(["--gpu-memory-utilization", "0.3"])
    assert (share.kv_cache_memory_bytes, share.gpu_memory_utilization) == (None, 0.3)

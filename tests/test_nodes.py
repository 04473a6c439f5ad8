"""Two nodes train what one process trains: `torchrun` with its own rendezvous in two network namespaces joined by a cable.

Each namespace has interfaces, addresses and ports of its own, so all that two ranks say to one another goes over the cable. What
is shared is the disk. Making namespaces needs root.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.ranks_checks import weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PORT = 29500


class Host(NamedTuple):
    """One end of the cable."""

    namespace: str
    interface: str
    address: str


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts with one cable between them, and no other network."""
    number = os.getpid() % 10**7
    ends = [Host(f"ludic-node-{number}-{n}", f"ln{number}{'ab'[n]}", f"198.18.78.{n + 1}") for n in (0, 1)]
    steps = [["ip", "netns", "add", host.namespace] for host in ends]
    steps.append(["ip", "link", "add", ends[0].interface, "type", "veth", "peer", "name", ends[1].interface])
    for host in ends:
        steps += [
            ["ip", "link", "set", host.interface, "netns", host.namespace],
            ["ip", "-n", host.namespace, "addr", "add", f"{host.address}/30", "dev", host.interface],
            ["ip", "-n", host.namespace, "link", "set", host.interface, "up"],
            ["ip", "-n", host.namespace, "link", "set", "lo", "up"],
        ]
    try:
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("there is no `ip` here to make network namespaces with")
            if done.returncode:
                pytest.skip(f"no network namespace can be made here: {done.stderr.strip() or ' '.join(step)}")
        yield ends
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "link", "del", ends[0].interface], capture_output=True, check=False)
            for host in ends:
                subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def started(words: list[str], **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def bytes_sent(host: Host) -> int:
    """Over the cable, since it was put in."""
    words = ["ip", "-n", host.namespace, "-j", "-s", "link", "show", "dev", host.interface]
    shown = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


@pytest.mark.timeout(900)
def test_two_nodes_that_torchrun_brings_together_train_what_one_process_trains(
    hosts: list[Host], digit_policy_dir: Path, digit_problems: Path, tmp_path: Path
) -> None:
    run = [
        *("examples/gsm8k/train_gsm8k.py", "--engine", "local", "--model", str(digit_policy_dir)),
        *("--dataset", str(digit_problems / "train.jsonl"), "--train-steps", "2", "--rollouts-per-update", "32"),
        *("--group-size", "4", "--max-tokens", "14", "--max-seq-len", "192", "--lr", "3e-3", "--warmup-steps", "0"),
        *("--max-grad-norm", "0", "--logger", "none", "--eval-limit", "0", "--no-checks", "--out-dir"),
    ]
    nodes = []
    for host in hosts:
        launcher = [
            *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"),
            *("--rdzv_endpoint", f"{hosts[0].address}:{PORT}", "--rdzv_id", "run-1", "--local_addr", host.address),
            # The name of this machine is not that of either end of the cable.
            *("--rdzv_conf", f"is_host={host is hosts[0]}"),
        ]
        words = ["ip", "netns", "exec", host.namespace, sys.executable, *launcher, *run, str(tmp_path / "nodes")]
        nodes.append(started(words, GLOO_SOCKET_IFNAME=host.interface))
    printed = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)
    assert [text.count("2 updates, 64 rollouts") for text in sorted(printed, key=len)] == [0, 1]
    alone = started([sys.executable, *run, str(tmp_path / "alone")])
    said, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, said
    one, two = (weights(tmp_path / name / "checkpoints_gsm8k/step_2") for name in ("alone", "nodes"))
    assert two == pytest.approx(one, rel=0, abs=1e-3)  # two updates move a weight by up to 6e-3
    size = (tmp_path / "nodes/checkpoints_gsm8k/step_2/model.safetensors").stat().st_size
    assert min(map(bytes_sent, hosts)) > size, "gradients and weights went over the cable"

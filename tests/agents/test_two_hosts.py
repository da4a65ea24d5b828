"""Two agents of torchrun, each as on a machine of its own, meet and train together."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUICK
from torch.testing import assert_close

from tokenenv.cli.main import main
from tokenenv.storage import read_tensors

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_two_hosts_train_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They find each other by rendezvous at an address of the first, and not by a shared folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port, quick = free_port(), shlex.split(QUICK)
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two-hosts",
                "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", f"127.0.0.{node + 1}",
                "-m", "tokenenv", *quick, "--out", str(tmp_path / f"node-{node}" / "run"),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    runs = list(tmp_path.glob("node-*/run"))
    assert len(runs) == 1  # only the first process writes, whichever host it is on
    assert sum("2 processes" in text for text in said) == 1
    assert main([*quick, "--out", "alone"]) == 0
    alone, together = (
        read_tensors(run / "policy.safetensors")[0] for run in (Path("alone"), *runs)
    )
    for name, tensor in alone.items():
        assert_close(together[name], tensor, atol=1e-4, rtol=1e-4)

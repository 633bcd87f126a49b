"""Several processes compute what one does, and die together."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrla.datasets import generate_shapes
from tests.conftest import ROOT, free_port
from tests.helpers import DEMO
from tests.zygote import run_command, run_ranks

CASES = Path(__file__).with_name("distribution_cases.py")
ALL = ("frozen_norms", "sync_norms", "checkpointing", "accumulation", "channels_last")


def together(folder: Path, world: int, *cases: str, **env: str) -> str:
    """Run cases in ``world`` processes; what the first one prints."""
    said = run_ranks(world, CASES, *cases, folder=folder, **env)
    assert all(f"{case}: passed" in text for text in said for case in cases)
    return said[0]


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """Gradients with frozen norms and SyncBN, recomputation, accumulation."""
    together(tmp_path, 2, *ALL)


def test_no_parameter_stays_unused(tmp_path):
    """One process: DDP looks for parameters without a gradient in each."""
    assert "combinations" in together(tmp_path, 1, "unused")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_host_and_kind(world, tmp_path):
    together(tmp_path, world, *ALL, EVERY="1")


@pytest.mark.slow
def test_no_parameter_of_any_combination_stays_unused(tmp_path):
    print(together(tmp_path, 1, "unused", EVERY="1"))


# --- tools/dist_train.sh ---

CONFIG = f"""
_base_ = {str(DEMO)!r}
custom_imports = dict(imports=["mmrla", "tests.engine.resume_parts"], allow_failed_imports=False)
randomness = dict(seed=5)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type="SyncBuffersHook"), dict(type="FailingHook"), dict(type="DigestHook")]
"""


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Config and options of a short training of a detector, work dir last."""
    generate_shapes(tmp_path / "shapes", 8, 2, seed=0)
    (tmp_path / "config.py").write_text(CONFIG)
    options = ["--data-root", str(tmp_path / "shapes"), "--work-dir", str(tmp_path / "run")]
    return [str(tmp_path / "config.py"), *options]


def launch(log: Path, arguments: list[str], nproc: int, **env: str) -> subprocess.Popen:
    config, *options = arguments
    with log.open("w") as file:
        return subprocess.Popen(
            [str(ROOT / "tools/dist_train.sh"), config, str(nproc), *options],
            stdout=file, stderr=file, env={**os.environ, "PYTHON": sys.executable, **env},
        )  # fmt: skip


def seconds_since_failure(tmp_path: Path) -> float:
    return time.time() - float((tmp_path / "run/failed_at").read_text())


def root_cause(log: str) -> str:
    return log.split("Root Cause (first observed failure)")[1].rstrip(" =\n")


def test_a_failure_leaves_its_traceback_for_the_launcher(arguments, tmp_path):
    """torchrun, which sets the variable, shows what is in the file as the root cause."""
    error = tmp_path / "error.json"
    failing = dict(MMRLA_TEST_RANK="0", MMRLA_TEST_HOW="raise")
    train = ROOT / "tools/train.py"
    done = run_command(train, *arguments, TORCHELASTIC_ERROR_FILE=str(error), **failing)
    assert done.returncode == 1
    message = json.loads(error.read_text())["message"]
    assert "a wire came loose" in message["message"]
    assert "in after_train_iter" in message["extraInfo"]["py_callstack"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_process_that_dies_takes_the_job_down(how, arguments, tmp_path):
    log = tmp_path / "log"
    job = launch(log, arguments, 2, MMRLA_TEST_RANK="1", MMRLA_TEST_HOW=how)
    assert job.wait(timeout=400) == 1
    took = seconds_since_failure(tmp_path)
    print(f"{how}: {took:.1f} s from the failure to the end of the job")
    assert took < 60
    cause = root_cause(log.read_text())
    assert "rank      : 1 (local_rank: 1)" in cause
    if how == "raise":
        assert "in after_train_iter" in cause
        assert cause.endswith("RuntimeError: a wire came loose")
    else:
        assert "Signal 9 (SIGKILL) received" in cause


def two_nodes(tmp_path: Path, arguments: list[str], nproc: int, **env: str):
    env |= dict(NNODES="2", MASTER_ADDR="127.0.0.1", PORT=str(free_port()))
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    nodes = [launch(log, arguments, nproc, NODE_RANK=str(r), **env) for r, log in enumerate(logs)]
    return [node.wait(timeout=500) for node in nodes], [log.read_text() for log in logs]


@pytest.mark.slow
def test_two_nodes(arguments, tmp_path):
    """Two launchers of two processes on loopback: four processes of one training."""
    status, logs = two_nodes(tmp_path, arguments, 2)
    assert status == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    assert re.search(r"Epoch\(train\)\s+\[1\]\[1/1\]", logs[0])  # 8 images over 4 x 2
    assert len({(tmp_path / f"run/rank{rank}").read_text() for rank in range(4)}) == 1


@pytest.mark.slow
def test_a_failure_on_one_node_ends_both(arguments, tmp_path):
    failing = dict(MMRLA_TEST_RANK="1", MMRLA_TEST_HOW="raise")
    status, logs = two_nodes(tmp_path, arguments, 1, **failing)
    ended = seconds_since_failure(tmp_path)
    print(f"{ended:.1f} s from the failure to the end of both nodes")
    assert status == [1, 1]
    assert ended < 60
    assert root_cause(logs[1]).endswith("RuntimeError: a wire came loose")

"""Detectors whose training is killed, or finds the disk full, go on to the same weights."""

from __future__ import annotations

import random
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from mmrla.checkpoints.atomic import damage, latest_intact
from mmrla.datasets import generate_shapes
from tests.conftest import ROOT
from tests.engine.test_resume import assert_same_training
from tests.helpers import DEMO
from tests.zygote import kill, start, start_ranks, wait

# torch 2.1 scales losses on GPUs alone.
WRAPPER = "ScaledOptimWrapper" if hasattr(torch.amp, "GradScaler") else "OptimWrapper"
# Random flips in workers, stochastic depth, samplers of anchors and boxes, batch norms in training,
# averaged weights, a scheduler of iterations and one of epochs, and a validation in between.
CONFIG = f"""
_base_ = {str(DEMO)!r}
custom_imports = dict(imports=["mmrla", "tests.engine.resume_parts"], allow_failed_imports=False)
randomness = dict(seed=5)
model = dict(backbone=dict(drop_path_rate=0.2))
train_dataloader = dict(batch_size=2, num_workers=2, persistent_workers=True)
train_cfg = dict(val_interval=1)
optim_wrapper = dict(type={WRAPPER!r})
custom_hooks = [dict(type="EMAHook", momentum=0.1), dict(type="SyncBuffersHook")]
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=2), logger=dict(interval=1)
)
"""


class Runs:
    """Runs of tools/train.py in a folder."""

    def __init__(self, folder: Path, epochs: int, images: int = 10) -> None:
        self.folder = folder
        generate_shapes(folder / "shapes", images, 2, seed=0)
        (folder / "config.py").write_text(f"{CONFIG}train_cfg['max_epochs'] = {epochs}\n")

    def command(self, work_dir: Path, *arguments: str) -> list:
        return [ROOT / "tools/train.py", self.folder / "config.py", "--data-root",
                self.folder / "shapes", "--work-dir", work_dir, *arguments]  # fmt: skip

    def start(self, work_dir: Path, *arguments: str, **env: str) -> BaseProcess:
        return start(*self.command(work_dir, *arguments), log=self.log(work_dir), **env)

    def train(self, work_dir: Path, *arguments: str, **env: str) -> int:
        return wait(self.start(work_dir, *arguments, **env))

    def log(self, work_dir: Path) -> Path:
        return self.folder / f"{work_dir.name}.log"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), epochs=2, images=6)


@pytest.fixture(scope="module")
def whole(runs):
    """The last checkpoint of a run that nobody disturbed."""
    work_dir = runs.folder / "whole"
    assert runs.train(work_dir) == 0, runs.log(work_dir).read_text()[-3000:]
    return work_dir / "iter_6.pth"


def test_killed_detector_ends_with_the_same_weights(runs, whole):
    work_dir = runs.folder / "killed"
    assert runs.train(work_dir, MMRLA_TEST_DIE="iter_2.pth") == -9  # half written
    assert list(work_dir.glob(".iter_2.pth.*.mmrla-tmp"))
    assert latest_intact(work_dir) == str(work_dir / "iter_1.pth")
    # Once the epoch's last iteration is saved; with another number of workers in between.
    options = ["--resume", "--cfg-options", "train_dataloader.num_workers=0",
               "train_dataloader.persistent_workers=False"]  # fmt: skip
    assert runs.train(work_dir, *options, MMRLA_TEST_DIE="iter_3.pth:noted") == -9
    assert not list(work_dir.glob(".*.mmrla-tmp"))
    # A checkpoint that is there, but that last_checkpoint does not name yet.
    assert runs.train(work_dir, "--resume", MMRLA_TEST_DIE="iter_5.pth:named") == -9
    assert latest_intact(work_dir) == str(work_dir / "iter_4.pth")
    assert runs.train(work_dir, "--resume") == 0, runs.log(work_dir).read_text()[-3000:]
    assert_same_training(work_dir / whole.name, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 30 MiB: one checkpoint of the detector fits, two do not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(runs, whole, small_disk):
    work_dir = small_disk / "full"
    assert runs.train(work_dir) == 2
    log = runs.log(work_dir).read_text()
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"cannot write {work_dir}/iter_2.pth: No space left on device" in line
    assert "MiB to write" in line
    files = [p.name for p in work_dir.iterdir() if p.is_file() and "iter" in p.name]
    assert files == ["iter_1.pth"]
    assert latest_intact(work_dir) == str(work_dir / "iter_1.pth")
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert runs.train(work_dir, "--resume") == 0
    assert_same_training(work_dir / whole.name, whole)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path):
    """Every fourth kill waits until a checkpoint is being written."""
    runs = Runs(tmp_path, epochs=4)
    rng = random.Random(20)
    begun = time.monotonic()
    assert runs.train(tmp_path / "whole") == 0
    duration = time.monotonic() - begun
    by_epoch = ["--cfg-options", "default_hooks.checkpoint.by_epoch=True"]
    kills = writing = finished = 0
    status = -9
    while kills < 20 or status == -9:  # the last one killed goes on to its end too
        work_dir = tmp_path / f"run{finished}"
        options = by_epoch if finished % 2 else []
        last = work_dir / ("epoch_4.pth" if finished % 2 else "iter_20.pth")
        process = runs.start(work_dir, "--resume", *options)
        if kills < 20:
            deadline = time.monotonic() + rng.uniform(0.15, 0.5) * duration
            in_write = kills % 4 == 3
            while process.is_alive():
                half = any(work_dir.glob(".*.mmrla-tmp"))
                if time.monotonic() > deadline and (half or not in_write):
                    kill(process)
                    break
                time.sleep(0.0005 if in_write else 0.01)
        status = wait(process)
        assert status in (0, -9), runs.log(work_dir).read_text()[-3000:]
        for path in work_dir.glob("*.pth"):
            assert damage(path) is None
        if status == -9:
            kills += 1
            writing += any(work_dir.glob(".*.mmrla-tmp"))
            at = latest_intact(work_dir)
            print(f"kill {kills}: run {finished}, resumes from {at and Path(at).name}")
        else:
            assert_same_training(last, tmp_path / "whole/iter_20.pth")
            finished += 1
    print(f"{kills} kills, {writing} inside a write, {finished} runs ended")
    assert writing >= 3


@pytest.mark.slow
@pytest.mark.parametrize("by_epoch", [True, False])
def test_two_processes_are_killed(by_epoch, tmp_path):
    """Both at once, or one, which the other does not survive; between and inside iterations."""
    runs = Runs(tmp_path, epochs=10 if by_epoch else 6)
    options = ["--launcher", "pytorch", "--cfg-options",
               f"default_hooks.checkpoint.by_epoch={by_epoch}"]  # fmt: skip

    def both(work_dir: Path, *arguments: str) -> list[BaseProcess]:
        command = runs.command(work_dir, *arguments, *options)
        return start_ranks(2, *command, folder=tmp_path)

    name = "epoch_10.pth" if by_epoch else "iter_18.pth"  # 10 images, 2 x 2 a step
    begun = time.monotonic()
    whole = [wait(process) for process in both(tmp_path / "whole")]
    interval = (time.monotonic() - begun) / (15 if by_epoch else 24)
    assert whole == [0, 0], (tmp_path / "rank0.log").read_text()[-3000:]
    rng = random.Random(2)
    work_dir = tmp_path / "killed"
    for victims in ((0, 1), (0,), (1,), (1, 0)):
        before = latest_intact(work_dir)
        processes = both(work_dir, "--resume")
        while latest_intact(work_dir) == before and processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, interval))
        for rank in victims:
            kill(processes[rank])
        killed = time.monotonic()
        status = [wait(process) for process in processes]
        print(f"kill {victims}: {status} after {time.monotonic() - killed:.1f} s; resumes from "
              f"{Path(latest_intact(work_dir)).name}")  # fmt: skip
        assert all(status[rank] == -9 for rank in victims)
        assert all(status), "a process went on without the other"
        assert time.monotonic() - killed < 60
        assert all(damage(path) is None for path in work_dir.glob("*.pth"))
    assert [wait(process) for process in both(work_dir, "--resume")] == [0, 0]
    assert_same_training(work_dir / name, tmp_path / "whole" / name)

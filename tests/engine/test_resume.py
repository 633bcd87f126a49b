"""Runs that are killed and go on: the same weights bit for bit, and never a damaged checkpoint."""

from __future__ import annotations

import errno
import os
import pickle
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmrla.checkpoints import atomic
from mmrla.checkpoints.atomic import damage, latest_intact, remove_temporaries, write_atomically
from mmrla.checkpoints.files import CheckpointError
from mmrla.datasets import generate_shapes
from mmrla.engine.launch import check_weights
from mmrla.engine.resume import ResumableBatches
from tests.conftest import ROOT
from tests.helpers import DEMO
from tests.zygote import Zygote, kill


def differences(a: object, b: object, at: str = "") -> list[str]:
    """Where two checkpoints are not equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [at]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [f"{at}: {set(a) ^ set(b)}"]
        return [d for key in a for d in differences(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{at}: {len(a)} and {len(b)}"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{at}[{i}]")]
    return [] if a == b else [f"{at}: {a!r} and {b!r}"]


def assert_same_training(got: Path, expected: Path) -> None:
    """Two checkpoints hold the same weights, averages, optimizers and schedulers."""
    one, other = (torch.load(path, weights_only=False) for path in (got, expected))
    assert one["meta"]["iter"] == other["meta"]["iter"]
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert (part in one) == (part in other)
        assert differences(one.get(part), other.get(part), part) == []


# --- files ---


def test_a_file_is_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    write_atomically(b"old", path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(CheckpointError) as caught:
        write_atomically(b"new" * 2**20, path)
    assert f"cannot write {path}: No space left on device (3.0 MiB to write," in str(caught.value)
    assert "MiB free" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_1.pth"]


def saved(path: Path, number: int) -> Path:
    torch.save({"state_dict": {"w": torch.full((500,), number)}, "meta": {"iter": number}}, path)
    os.utime(path, (number, number))
    return path


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    good = saved(tmp_path / "epoch_1.pth", 1)
    bad = saved(tmp_path / "epoch_2.pth", 2)
    saved(tmp_path / "best_mAP_epoch_3.pth", 3)  # holds no optimizer
    (tmp_path / "last_checkpoint").write_text(str(bad))
    assert latest_intact(tmp_path) == str(bad)
    content = bad.read_bytes()
    rng = np.random.default_rng(0)
    kinds = [content[: rng.integers(len(content))] for _ in range(20)]
    flipped = bytearray(content)
    flipped[content.index(torch.full((500,), 2).numpy().tobytes()) + 777] ^= 4
    for damaged in (b"", *kinds, bytes(flipped), b"\0" * len(content)):
        bad.write_bytes(damaged)
        assert damage(bad) is not None
        assert latest_intact(tmp_path) == str(good)
    # A pointer that a kill of mmengine's own hook left empty.
    (tmp_path / "last_checkpoint").write_text("")
    assert latest_intact(tmp_path) == str(good)
    cfg = Config(dict(resume=True, work_dir=str(tmp_path)))
    check_weights(cfg)
    assert cfg.load_from == str(good)
    good.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"no intact checkpoint.*epoch_\d.*epoch_\d"):
        latest_intact(tmp_path)


def test_a_work_dir_that_moved_or_is_empty(tmp_path):
    assert latest_intact(tmp_path) is None
    path = saved(tmp_path / "epoch_1.pth", 1)
    saved(tmp_path / "epoch_2.pth", 2)
    (tmp_path / "last_checkpoint").write_text("/where/it/was/epoch_1.pth")
    assert latest_intact(tmp_path) == str(path)
    stale = tmp_path / ".epoch_3.pth.17.mmrla-tmp"
    stale.write_bytes(b"half")
    (tmp_path / ".keep").write_bytes(b"")
    assert remove_temporaries(tmp_path) == [stale]
    assert (tmp_path / ".keep").exists()


# --- data ---


class Noise(Dataset):
    """Every sample draws from all three generators."""

    metainfo: dict = {}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return dict(x=torch.tensor([index, *drawn]))


def test_samples_are_a_function_of_their_place():
    def epoch(workers: int, skip: int = 0, seed: int = 3) -> list[torch.Tensor]:
        loader = DataLoader(
            Noise(), batch_size=4, sampler=DefaultSampler(Noise(), seed=1), num_workers=workers
        )
        batches = ResumableBatches(loader.batch_sampler)
        batches.key, batches.skip = (seed, 0, 0), skip
        vars(loader)["batch_sampler"] = batches
        return [batch["x"] for batch in loader]

    random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    whole = torch.cat(epoch(0))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert torch.equal(whole, torch.cat(epoch(2)))
    assert torch.equal(whole[8:], torch.cat(epoch(2, skip=2)))
    assert not torch.equal(whole, torch.cat(epoch(0, seed=4)))
    assert len(whole.unique()) == 12 * 4  # no number twice
    batch = next(iter(ResumableBatches(epoch_batches := [[1, 2]])))
    assert pickle.loads(pickle.dumps(batch)).indices == epoch_batches[0]


# --- runs of a toy ---


class Toy(BaseModel):
    """Noise, a norm with statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))

    def forward(self, x, mode):
        x = torch.stack(x)
        out = self.net(x)
        return dict(loss=out.square().mean()) if mode == "loss" else [out.mean().item()]


class Falling(BaseMetric):
    """Better with each validation up to the third."""

    seen = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.seen += 1
        return dict(score=min(self.seen, 3))


def toy(work_dir: Path, resume: str | bool = False, **settings) -> Runner:
    hook = dict(type="mmrla.AtomicCheckpointHook", interval=1) | settings.pop("checkpoint", {})
    load = dict(load_from=resume) if isinstance(resume, str) else {}
    config = dict(
        train_dataloader=dict(
            dataset=Noise(), sampler=dict(type="DefaultSampler", shuffle=True), batch_size=4
        ),
        train_cfg=dict(type="mmrla.ResumableTrainLoop", max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="Adam", lr=0.01)),
        param_scheduler=dict(type="MultiStepLR", milestones=[1, 3]),
        default_hooks=dict(checkpoint=hook),
        default_scope="mmengine",
    )
    torch.manual_seed(0)
    return Runner(Toy(), str(work_dir), resume=bool(resume), **load, **(config | settings),
                  experiment_name=f"toy_{time.time_ns()}")  # fmt: skip


@pytest.mark.parametrize("each_rank", [False, True])
def test_a_run_without_a_seed_goes_on_with_the_seed_it_drew(tmp_path, each_rank):
    """mmengine's own resume keeps the order of data of the new run's seed."""
    randomness = dict(seed=None, diff_rank_seed=each_rank)
    whole = toy(tmp_path / "whole", randomness=randomness)
    whole.train()
    on = toy(tmp_path / "on", str(tmp_path / "whole/epoch_2.pth"), randomness=randomness)
    on.train()
    assert_same_training(tmp_path / "on/epoch_4.pth", tmp_path / "whole/epoch_4.pth")


def test_inside_an_epoch_and_what_cannot_be_equal(tmp_path):
    by_iter = dict(by_epoch=False, interval=2)
    whole = toy(tmp_path / "whole", checkpoint=by_iter)
    whole.train()
    on = toy(tmp_path / "on", str(tmp_path / "whole/iter_4.pth"), checkpoint=by_iter)
    on.train()
    assert on.iter == 12  # mmengine's loop would have started the second epoch again
    assert_same_training(tmp_path / "on/iter_12.pth", tmp_path / "whole/iter_12.pth")

    def log_of(name: str, **settings) -> str:
        toy(tmp_path / name, str(tmp_path / "whole/iter_4.pth"), **settings).train()
        return "".join(path.read_text() for path in (tmp_path / name).glob("*/*.log"))

    log = log_of("loop", train_cfg=dict(by_epoch=True, max_epochs=4))
    assert "not as if it had never been stopped: the training loop is no mmrla" in log
    loader = dict(dataset=Noise(), sampler=dict(type="DefaultSampler", shuffle=True), batch_size=2)
    log = log_of("batches", train_dataloader=loader)
    assert "it was saved with 3 batches per epoch" in log
    assert "is not in epoch 2 of 6 batches" in log
    wrapper = dict(optimizer=dict(type="Adam", lr=0.01), accumulative_counts=2)
    log = log_of("gathered", optim_wrapper=wrapper, checkpoint=dict(by_epoch=False, interval=3))
    assert "every 3 iterations falls between the 2 that accumulative_counts gathers" in log


def test_old_checkpoints_go_only_when_the_new_is_safe(tmp_path, monkeypatch):
    """With mmengine's hook a kill here leaves none (max_keep_ckpts=1), and no best one."""
    present = []
    replace = os.replace

    def looking(source, target):
        present.append((Path(target).name, sorted(p.name for p in tmp_path.glob("*.pth"))))
        replace(source, target)

    monkeypatch.setattr(atomic.os, "replace", looking)
    validation = dict(
        val_dataloader=dict(dataset=Noise(), sampler=dict(type="DefaultSampler", shuffle=False)),
        val_cfg=dict(), val_evaluator=[Falling()],
    )  # fmt: skip
    hook = dict(max_keep_ckpts=1, save_best="score", rule="greater")
    toy(tmp_path, checkpoint=hook, **validation).train()
    before = dict(reversed([(name, there) for name, there in present if name.endswith("pth")]))
    assert before["epoch_2.pth"] == ["best_score_epoch_1.pth", "epoch_1.pth"]
    assert before["best_score_epoch_2.pth"] == ["best_score_epoch_1.pth", "epoch_2.pth"]
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "best_score_epoch_3.pth", "epoch_4.pth",
    ]  # fmt: skip
    assert latest_intact(tmp_path) == str(tmp_path / "epoch_4.pth")


# --- runs of a detector ---

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

    def __init__(self, zygote: Zygote, folder: Path, epochs: int) -> None:
        self.zygote = zygote
        self.folder = folder
        generate_shapes(folder / "shapes", 10, 2, seed=0)
        (folder / "config.py").write_text(f"{CONFIG}train_cfg['max_epochs'] = {epochs}\n")

    def command(self, work_dir: Path, *arguments: str) -> list:
        return [ROOT / "tools/train.py", self.folder / "config.py", "--data-root",
                self.folder / "shapes", "--work-dir", work_dir, *arguments]  # fmt: skip

    def start(self, work_dir: Path, *arguments: str, **env: str) -> int:
        command = self.command(work_dir, *arguments)
        return self.zygote.start(*command, log=self.log(work_dir), **env)

    def train(self, work_dir: Path, *arguments: str, **env: str) -> int:
        return self.zygote.wait(self.start(work_dir, *arguments, **env))

    def log(self, work_dir: Path) -> Path:
        return self.folder / f"{work_dir.name}.log"


@pytest.fixture(scope="module")
def runs(zygote, tmp_path_factory):
    return Runs(zygote, tmp_path_factory.mktemp("runs"), epochs=2)


@pytest.fixture(scope="module")
def whole(runs):
    """The last checkpoint of a run that nobody disturbed."""
    work_dir = runs.folder / "whole"
    assert runs.train(work_dir) == 0, runs.log(work_dir).read_text()[-3000:]
    return work_dir / "iter_10.pth"


def test_killed_detector_ends_with_the_same_weights(runs, whole):
    work_dir = runs.folder / "killed"
    assert runs.train(work_dir, MMRLA_TEST_DIE="iter_3.pth") == -9  # half written
    assert list(work_dir.glob(".iter_3.pth.*.mmrla-tmp"))
    assert latest_intact(work_dir) == str(work_dir / "iter_2.pth")
    # Once the epoch's last iteration is saved; with another number of workers in between.
    options = ["--resume", "--cfg-options", "train_dataloader.num_workers=0",
               "train_dataloader.persistent_workers=False"]  # fmt: skip
    assert runs.train(work_dir, *options, MMRLA_TEST_DIE="iter_5.pth:noted") == -9
    assert not list(work_dir.glob(".*.mmrla-tmp"))
    # A checkpoint that is there, but that last_checkpoint does not name yet.
    assert runs.train(work_dir, "--resume", MMRLA_TEST_DIE="iter_8.pth:named") == -9
    assert latest_intact(work_dir) == str(work_dir / "iter_7.pth")
    assert runs.train(work_dir, "--resume") == 0, runs.log(work_dir).read_text()[-3000:]
    assert_same_training(work_dir / "iter_10.pth", whole)


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
    assert [p.name for p in work_dir.iterdir() if p.is_file() and "iter" in p.name] == [
        "iter_1.pth"
    ]
    assert latest_intact(work_dir) == str(work_dir / "iter_1.pth")
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    assert runs.train(work_dir, "--resume") == 0
    assert_same_training(work_dir / "iter_10.pth", whole)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(zygote, tmp_path):
    """Every fourth kill waits until a checkpoint is being written."""
    runs = Runs(zygote, tmp_path, epochs=4)
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
        pid = runs.start(work_dir, "--resume", *options)
        if kills < 20:
            deadline = time.monotonic() + rng.uniform(0.15, 0.5) * duration
            in_write = kills % 4 == 3
            while runs.zygote.alive(pid):
                half = any(work_dir.glob(".*.mmrla-tmp"))
                if time.monotonic() > deadline and (half or not in_write):
                    kill(pid)
                    break
                time.sleep(0.0005 if in_write else 0.01)
        status = zygote.wait(pid)
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
def test_two_processes_are_killed(by_epoch, zygote, tmp_path):
    """Both at once, or one, which the other does not survive; between and inside iterations."""
    runs = Runs(zygote, tmp_path, epochs=10 if by_epoch else 6)
    options = ["--launcher", "pytorch", "--cfg-options",
               f"default_hooks.checkpoint.by_epoch={by_epoch}"]  # fmt: skip

    def start(work_dir: Path, *arguments: str) -> list[int]:
        command = runs.command(work_dir, *arguments, *options)
        return zygote.start_ranks(2, *command, folder=tmp_path)

    name = "epoch_10.pth" if by_epoch else "iter_18.pth"  # 10 images, 2 x 2 a step
    begun = time.monotonic()
    whole = [zygote.wait(pid) for pid in start(tmp_path / "whole")]
    interval = (time.monotonic() - begun) / (15 if by_epoch else 24)
    assert whole == [0, 0], (tmp_path / "rank0.log").read_text()[-3000:]
    rng = random.Random(2)
    work_dir = tmp_path / "killed"
    for victims in ((0, 1), (0,), (1,), (1, 0)):
        before = latest_intact(work_dir)
        pids = start(work_dir, "--resume")
        while latest_intact(work_dir) == before and zygote.alive(pids[0]):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, interval))
        for rank in victims:
            kill(pids[rank])
        killed = time.monotonic()
        status = [zygote.wait(pid) for pid in pids]
        print(f"kill {victims}: {status} after {time.monotonic() - killed:.1f} s; resumes from "
              f"{Path(latest_intact(work_dir)).name}")  # fmt: skip
        assert all(status[rank] == -9 for rank in victims)
        assert all(status), "a process went on without the other"
        assert time.monotonic() - killed < 60
        assert all(damage(path) is None for path in work_dir.glob("*.pth"))
    assert [zygote.wait(pid) for pid in start(work_dir, "--resume")] == [0, 0]
    assert_same_training(work_dir / name, tmp_path / "whole" / name)

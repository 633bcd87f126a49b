"""Runs that are killed and go on: the same weights bit for bit, and never a damaged checkpoint."""

from __future__ import annotations

import errno
import os
import pickle
import random
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
from mmrla.engine.run.resume import ResumableBatches
from mmrla.engine.run.runner import check_weights


def leaves(value: object, at: str = "") -> dict[str, object]:
    """What nested dicts and lists hold, by place."""
    if not isinstance(value, (dict, list, tuple)):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, one in items for place, leaf in leaves(one, f"{at}.{key}").items()}


def assert_same_training(got: Path, expected: Path) -> None:
    """Two checkpoints hold the same weights, averages, optimizers and schedulers, bit for bit."""
    one, other = (torch.load(path, weights_only=False) for path in (got, expected))
    assert one["meta"]["iter"] == other["meta"]["iter"]
    parts = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
    one, other = (leaves({k: whole[k] for k in parts if k in whole}) for whole in (one, other))
    assert one.keys() == other.keys()
    for place, a in one.items():
        b = other[place]
        assert type(a) is type(b), place
        equal = a.dtype == b.dtype and torch.equal(a, b) if torch.is_tensor(a) else a == b
        assert equal, place


# --- files ---


def test_a_file_is_old_or_new(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    write_atomically(b"old", path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    message = rf"cannot write {path}: No space left on device \(3.0 MiB to write, .* MiB free"
    with pytest.raises(CheckpointError, match=message):
        write_atomically(b"new" * 2**20, path)
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
    def epoch(workers: int, skip: int = 0, seed: int = 3) -> torch.Tensor:
        sampler = DefaultSampler(Noise(), seed=1)
        loader = DataLoader(Noise(), batch_size=4, sampler=sampler, num_workers=workers)
        batches = ResumableBatches(loader.batch_sampler)
        batches.key, batches.skip = (seed, 0, 0), skip
        vars(loader)["batch_sampler"] = batches
        return torch.cat([batch["x"] for batch in loader])

    random.seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    whole = epoch(0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert torch.equal(whole, epoch(2))
    assert torch.equal(whole[8:], epoch(2, skip=2))
    assert not torch.equal(whole, epoch(0, seed=4))
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


def loader(shuffle: bool, **settings) -> dict:
    return dict(dataset=Noise(), sampler=dict(type="DefaultSampler", shuffle=shuffle), **settings)


def toy(work_dir: Path, resume: str | bool = False, **settings) -> Runner:
    hook = dict(type="mmrla.AtomicCheckpointHook", interval=1) | settings.pop("checkpoint", {})
    load = dict(load_from=resume) if isinstance(resume, str) else {}
    config = dict(
        train_dataloader=loader(shuffle=True, batch_size=4),
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
    log = log_of("batches", train_dataloader=loader(shuffle=True, batch_size=2))
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
    hook = dict(max_keep_ckpts=1, save_best="score", rule="greater")
    toy(tmp_path, checkpoint=hook, val_dataloader=loader(shuffle=False), val_cfg=dict(),
        val_evaluator=[Falling()]).train()  # fmt: skip
    before = dict(reversed([(name, there) for name, there in present if name.endswith("pth")]))
    assert before["epoch_2.pth"] == ["best_score_epoch_1.pth", "epoch_1.pth"]
    assert before["best_score_epoch_2.pth"] == ["best_score_epoch_1.pth", "epoch_2.pth"]
    assert {p.name for p in tmp_path.glob("*.pth")} == {"best_score_epoch_3.pth", "epoch_4.pth"}
    assert latest_intact(tmp_path) == str(tmp_path / "epoch_4.pth")

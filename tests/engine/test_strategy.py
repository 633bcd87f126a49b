"""``mmrla train`` with mmengine's FlexibleRunner: several processes compute what one does."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import ROOT, free_port
from tests.zygote import Zygote

BATCH, STEPS = 4, 4
NETWORKS = {
    "deit": dict(
        backbone=dict(
            type="mmrla.MRLAVisionTransformer", arch="deit-tiny", img_size=48, patch_size=16,
            zero_init_mrla=False,
        ),
        head=dict(type="VisionTransformerClsHead", num_classes=3, in_channels=192),
    ),
    "resnet": dict(
        # Norms on running statistics: those of a batch differ between processes.
        backbone=dict(
            type="mmrla.MRLAResNet", depth=18, norm_eval=True, zero_init_mrla=False,
            layer_attention=dict(type="MRLALight", head_channels=32),
        ),
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=3, in_channels=512),
    ),
}  # fmt: skip
RATES = {"deit": 0.01, "resnet": 1e-4}
FSDP = dict(type="mmrla.FSDPStrategy")
# Units of at least so many weights; else there is one unit.
POLICY = "torch.distributed.fsdp.wrap.size_based_auto_wrap_policy"
WRAPPED = dict(
    type="mmrla.FSDPStrategy",
    model_wrapper=dict(auto_wrap_policy=dict(type=POLICY, min_num_params=20000)),
)

CONFIG = """
_base_ = "mmpretrain::_base_/default_runtime.py"
custom_imports = dict(imports=["mmrla", "tests.engine.resume_parts"], allow_failed_imports=False)
runner_type = "FlexibleRunner"
strategy = {strategy!r}
data_preprocessor = dict(mean=[127.0] * 3, std=[64.0] * 3, num_classes=3)
model = dict(type="ImageClassifier", **{model!r})
data = dict(
    batch_size={batch}, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CustomDataset", data_root={data!r},
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
    ),
)
train_dataloader = val_dataloader = test_dataloader = data
val_evaluator = test_evaluator = dict(type="Accuracy", topk=(1,))
train_cfg = dict(type="mmrla.ResumableTrainLoop", max_epochs=2)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type="SGD", lr={rate}, momentum=0.9))
default_hooks = dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook"))
custom_hooks = [dict(type="LossesHook")]
randomness = dict(seed=0)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(BATCH * STEPS):
        path = folder / f"class{number % 3}/{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), generator.integers(0, 255, (48, 48, 3), np.uint8))
    return folder


def train(
    zygote: Zygote, folder: Path, world: int, config: dict, *options: str
) -> list[list[float]]:
    """Run tools/train.py in some processes; the losses that each has seen."""
    folder.mkdir()
    path = folder / "config.py"
    path.write_text(CONFIG.format(**config, batch=BATCH // world))
    argv = [ROOT / "tools/train.py", path, "--work-dir", folder, *options]
    env = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    argv += ["--launcher", "pytorch"] if world > 1 else []
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    pids = [
        zygote.start(*argv, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **env)
        for rank, log in enumerate(logs)
    ]
    status = [zygote.wait(pid, timeout=300) for pid in pids]
    assert status == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(world)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FSDP, WRAPPED], ids=["one unit", "many units"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_weights_spread_over_two_processes(name, strategy, images, zygote, tmp_path):
    """Losses and checkpoints are those of one process with twice the batch."""
    config = dict(strategy=strategy, model=NETWORKS[name], data=str(images), rate=RATES[name])
    (one,) = train(zygote, tmp_path / "one", 1, config)
    two = train(zygote, tmp_path / "two", 2, config)
    assert len(set(one)) == len(one) == 2 * STEPS
    mean = [sum(pair) / 2 for pair in zip(*two, strict=True)]
    assert mean == pytest.approx(one, abs=1e-5)
    units = int(max(
        line.split()[-1] for line in (tmp_path / "two/rank0.log").read_text().splitlines()
        if line.startswith("FSDP units:")
    ))
    assert (units > 10) if "model_wrapper" in strategy else (units == 1)

    expected, saved = (weights(tmp_path / run / "epoch_2.pth") for run in ("one", "two"))
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-4, atol=1e-5, msg=key)

    # A run that goes on, and one that starts from the weights.
    first = str(tmp_path / "two/epoch_1.pth")
    resumed = train(zygote, tmp_path / "resumed", 2, config, "--resume", first)
    assert resumed == [losses[STEPS:] for losses in two]
    again = weights(tmp_path / "resumed/epoch_2.pth")
    assert all(torch.equal(again[key], value) for key, value in saved.items())
    tuned = train(zygote, tmp_path / "tuned", 2, config, "--cfg-options", f"load_from={first}")
    assert [losses[0] for losses in tuned] == [losses[STEPS] for losses in two]

    # One process evaluates it.
    log = tmp_path / "test.log"
    argv = [tmp_path / "two/config.py", tmp_path / "two/epoch_2.pth", "--work-dir", tmp_path / "t"]
    assert zygote.run(ROOT / "tools/test.py", *argv, log=log) == 0, log.read_text()[-3000:]
    assert "accuracy/top1" in log.read_text()

"""``mmrla train`` with mmengine's FlexibleRunner: several processes compute what one does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.zygote import run_command, run_ranks

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
SGD = dict(
    optimizer=dict(type="SGD", momentum=0.9, weight_decay=0.5),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
CLIPPED = dict(SGD, clip_grad=dict(max_norm=0.5))
POLICY = dict(type="torch.distributed.fsdp.wrap.size_based_auto_wrap_policy", min_num_params=20000)
FSDP = dict(type="mmrla.FSDPStrategy")
ONE = dict(strategy=FSDP, optim=CLIPPED)
MANY = dict(strategy=dict(FSDP, model_wrapper=dict(auto_wrap_policy=POLICY)), optim=CLIPPED)
DEEPSPEED = dict(
    strategy=dict(
        type="DeepSpeedStrategy", config=dict(zero_allow_untested_optimizer=True),
        zero_optimization=dict(stage=3),
    ),
    optim=dict(SGD, type="DeepSpeedOptimWrapper"),
)  # fmt: skip

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
optim_wrapper = {optim!r}
optim_wrapper["optimizer"]["lr"] = {rate}
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


def train(folder: Path, world: int, config: dict, *options: str) -> tuple[list[list[float]], int]:
    """Run tools/train.py in some processes; their losses, and the number of FSDP's units."""
    folder.mkdir()
    path = folder / "config.py"
    path.write_text(CONFIG.format(**config, batch=BATCH // world))
    argv = [ROOT / "tools/train.py", path, "--work-dir", folder, *options]
    argv += ["--launcher", "pytorch"] if world > 1 else []
    run_ranks(world, *argv, folder=folder)
    found = [json.loads((folder / f"losses{rank}.json").read_text()) for rank in range(world)]
    return [each["losses"] for each in found], found[0]["units"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return get_fp32_state_dict_from_zero_checkpoint(str(path.parent), tag=path.name)
    return torch.load(path, weights_only=False)["state_dict"]


def require_equal(folder: Path, config: dict) -> int:
    """Two processes are one with twice the batch: in losses and in what they save."""
    (one,), _ = train(folder / "one", 1, config)
    two, units = train(folder / "two", 2, config)
    assert len(set(one)) == len(one) == 2 * STEPS
    assert [sum(pair) / 2 for pair in zip(*two, strict=True)] == pytest.approx(one, abs=1e-5)
    expected, saved = (weights(folder / run / "epoch_2.pth") for run in ("one", "two"))
    assert saved.keys() == expected.keys()
    for key, value in expected.items():
        # DeepSpeed makes all of it float32, counters too.
        torch.testing.assert_close(saved[key].to(value), value, rtol=1e-4, atol=1e-5, msg=key)
    return units


def require_evaluation(run: Path, checkpoint: Path) -> None:
    """One process evaluates a checkpoint, of which all tensors fit."""
    argv = [run / "config.py", checkpoint, "--work-dir", run / "test"]
    done = run_command(ROOT / "tools/test.py", *argv)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "0 missing, 0 unexpected, 0 of the wrong shape" in log
    trained = re.findall(r"Epoch\(val\).*accuracy/top1: ([\d.]+)", (run / "rank0.log").read_text())
    assert re.findall(r"accuracy/top1: ([\d.]+)", log) == trained[-1:]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ONE, MANY], ids=["one unit", "many units"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_fsdp_computes_what_one_process_does(name, settings, images, tmp_path):
    config = dict(settings, model=NETWORKS[name], data=str(images), rate=RATES[name])
    units = require_equal(tmp_path, config)
    assert (units > 10) if settings is MANY else (units == 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_fsdp_goes_on_from_its_checkpoints(name, images, tmp_path):
    config = dict(MANY, model=NETWORKS[name], data=str(images), rate=RATES[name])
    first = tmp_path / "first"
    losses, _ = train(first, 2, config)
    rest = [each[STEPS:] for each in losses]
    saved = str(first / "epoch_1.pth")
    assert train(tmp_path / "resumed", 2, config, "--resume", saved)[0] == rest
    resumed = weights(tmp_path / "resumed/epoch_2.pth")
    expected = weights(first / "epoch_2.pth")
    assert all(torch.equal(resumed[key], value) for key, value in expected.items())
    options = ("--cfg-options", f"load_from={saved}")
    tuned, _ = train(tmp_path / "tuned", 2, config, *options)
    assert [each[0] for each in tuned] == [each[0] for each in rest]
    require_evaluation(first, first / "epoch_2.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_deepspeed_computes_what_one_process_does(name, images, tmp_path):
    # What mmengine imports of it; newer releases lack it.
    pytest.importorskip("deepspeed.runtime.fp16.onebit")
    config = dict(DEEPSPEED, model=NETWORKS[name], data=str(images), rate=RATES[name])
    require_equal(tmp_path, config)
    run = tmp_path / "two"
    torch.save(dict(state_dict=weights(run / "epoch_2.pth")), run / "whole.pth")
    require_evaluation(run, run / "whole.pth")

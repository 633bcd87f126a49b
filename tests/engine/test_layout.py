"""Runs in channels_last, and in mixed precision on a CPU, beside plain ones."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmrla.cli import main
from mmrla.datasets import generate_shapes
from mmrla.engine import AmpOptimWrapper, ChannelsLastHook, amp, build_runner, set_data_root
from mmrla.engine.amp import set_amp, set_test_amp
from mmrla.engine.run.config import set_layout
from mmrla.loads import unwrapped
from tests.conftest import ROOT
from tests.engine.test_resume import assert_same_training
from tests.helpers import DEMO, refusal
from tests.networks import LIGHT, TINY

BACKBONES = {
    "resnet": dict(type="mmrla.MRLAResNet", layer_attention=LIGHT, **TINY),
    "vit": dict(
        type="mmrla.MRLAVisionTransformer", img_size=32, patch_size=8, layer_attention=LIGHT,
        arch=dict(embed_dims=64, num_layers=2, num_heads=4, feedforward_channels=64),
    ),
}  # fmt: skip


@DATASETS.register_module()
class Noise(Dataset):
    """Images of bytes with four classes."""

    metainfo: dict = {}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 32, 40), dtype=torch.uint8, generator=generator)
        if index % 2 == 0:
            image = image[..., :32]  # batches are padded
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 4))


@HOOKS.register_module()
class LookHook(Hook):
    """Notes losses, gradients, and the layout of what enters and leaves the backbone's layers.

    In float64, if asked for: there a rounding error selects no other proposals.
    """

    priority = "VERY_HIGH"

    def __init__(self, seen: dict, double: bool) -> None:
        self.seen, self.double = seen, double

    def before_run(self, runner: Runner) -> None:
        if self.double:
            model = unwrapped(runner.model).double()
            model.data_preprocessor.register_forward_hook(to_double)

    def before_train(self, runner: Runner) -> None:
        model = unwrapped(runner.model)
        self.seen.update(losses=[], grads={}, layouts=set(), dtypes=set())
        for name, parameter in model.named_parameters():
            grads = self.seen["grads"].setdefault(name, [])
            parameter.register_hook(lambda grad, to=grads: to.append(grad.clone()))
        for name, module in model.backbone.named_modules():
            # A layer attention of tokens sees them as a map in channels_last in any case.
            maps = isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and "mrla" not in name
            if maps or hasattr(module, "drop_path"):
                module.register_forward_hook(self._look)

    def _look(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in (*inputs, *outputs):
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and min(tensor.shape[1:]) > 1:
                self.seen["dtypes"].add(tensor.dtype)
                turned = tensor.is_contiguous(memory_format=torch.channels_last)
                self.seen["layouts"].add("channels_last" if turned else "NCHW")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.seen["losses"].append(outputs["loss"].item())


def to_double(module: nn.Module, args: tuple, data: dict) -> dict:
    return {**data, "inputs": data["inputs"].double()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    generate_shapes(root, 4, 2, image_size=64, seed=0)
    return root


def config(kind: str, shapes: Path) -> Config:
    """Two epochs of two iterations of a classifier, or of the demo's detector."""
    if kind == "detector":
        cfg = Config.fromfile(DEMO)
        set_data_root(cfg, shapes)
        cfg.optim_wrapper.optimizer = dict(type="SGD", lr=0.001, momentum=0.9)
        cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        # All anchors, as proposals too: a rounding error selects and draws no others.
        settings = cfg.model.train_cfg
        settings.rpn.sampler.num = settings.rcnn.sampler.num = 10**5
        settings.rpn_proposal.update(nms_pre=10**4, max_per_img=10**4, nms=dict(iou_threshold=1.0))
    else:
        neck = dict(type="GlobalAveragePooling") if kind == "resnet" else None
        loss = dict(type="CrossEntropyLoss")
        head = dict(type="LinearClsHead", num_classes=4, in_channels=64, loss=loss)
        model = dict(type="ImageClassifier", backbone=BACKBONES[kind], neck=neck, head=head)
        sampler = dict(type="DefaultSampler", shuffle=True)
        cfg = Config(dict(
            default_scope="mmpretrain", model=model,
            data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3, num_classes=4),
            train_dataloader=dict(batch_size=4, dataset=dict(type="Noise"), sampler=sampler),
            train_cfg=dict(type="mmrla.ResumableTrainLoop"),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05, momentum=0.9)),
            default_hooks=dict(checkpoint=dict(type="mmrla.AtomicCheckpointHook", interval=1)),
        ))  # fmt: skip
    cfg.param_scheduler = None
    cfg.train_cfg.update(max_epochs=2)
    cfg.randomness = dict(seed=3)
    return cfg


def train(
    kind: str, shapes: Path, work_dir: Path, channels_last: bool | None = None,
    mixed: bool = False, double: bool = False, **settings,
) -> tuple[Runner, dict]:  # fmt: skip
    """A run of :func:`config`, and what it was seen to do."""
    seen: dict = {}
    cfg = config(kind, shapes)
    set_amp(cfg, mixed)
    cfg.custom_hooks = [dict(type="EMAHook", momentum=0.1)]
    cfg.merge_from_dict(settings)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f"{kind}_{time.time_ns()}"
    set_layout(cfg, channels_last)
    runner = build_runner(cfg)
    runner.register_hook(LookHook(seen, double))
    runner.train()
    return runner, seen


@pytest.mark.parametrize("kind", ["resnet", "vit", "detector"])
def test_channels_last_changes_nothing_but_the_layout(kind, shapes, tmp_path):
    """Losses and gradients of a run; the activations' layout; resuming; the files' layout."""

    def run(name: str, channels_last: bool, **settings) -> tuple[Runner, dict]:
        return train(kind, shapes, tmp_path / name, channels_last, double=True, **settings)

    plain, expected = run("plain", False)
    turned, seen = run("turned", True)
    assert len(seen["losses"]) == 4
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-9)
    torch.testing.assert_close(seen["grads"], expected["grads"], rtol=1e-6, atol=1e-9)
    assert expected["layouts"] == {"NCHW"}
    assert seen["layouts"] == {"channels_last"}
    averages = [hook.ema_model.parameters() for run in (turned, plain) for hook in run.hooks
                if isinstance(hook, EMAHook)]  # fmt: skip
    torch.testing.assert_close(*map(list, averages), rtol=1e-6, atol=1e-9)

    checkpoint = tmp_path / "turned/epoch_1.pth"
    file = torch.load(checkpoint, weights_only=False)
    states = [file["state_dict"], file["ema_state_dict"], *file["optimizer"]["state"].values()]
    for value in (value for state in states for value in state.values()):
        assert value is None or value.stride() == torch.empty(value.shape).stride()
    resumed = dict(resume=True, load_from=str(checkpoint))
    on, seen = run("on", True, **resumed)
    assert len(seen["losses"]) == 2
    assert seen["layouts"] == {"channels_last"}
    assert_same_training(tmp_path / "on/epoch_2.pth", tmp_path / "turned/epoch_2.pth")
    for parameter, state in on.optim_wrapper.optimizer.state.items():
        assert state["momentum_buffer"].stride() == parameter.stride()
    _, seen = run("back", False, **resumed)
    assert seen["losses"] == pytest.approx(expected["losses"][2:], rel=1e-9)
    assert seen["layouts"] == {"NCHW"}


@pytest.mark.parametrize("kind", ["resnet", "vit", "detector"])
def test_mixed_precision_on_a_cpu(kind, shapes, tmp_path, monkeypatch):
    """bfloat16 near float32, resumed bit for bit, and in channels_last if it is convolutional."""
    monkeypatch.setattr(amp, "has_fast_bfloat16", lambda: kind == "resnet")
    _, expected = train(kind, shapes, tmp_path / "float32")
    assert expected["dtypes"] == {torch.float32}
    assert expected["layouts"] == {"NCHW"}
    run, seen = train(kind, shapes, tmp_path / "whole", mixed=True)
    assert type(run.optim_wrapper) is AmpOptimWrapper
    assert torch.bfloat16 in seen["dtypes"]
    assert seen["losses"] == pytest.approx(expected["losses"], rel=0.1)
    got, want = (torch.cat([g[0].flatten() for g in one["grads"].values()])
                 for one in (seen, expected))  # fmt: skip
    assert torch.cosine_similarity(got, want, 0) > 0.9
    assert seen["layouts"] == {"NCHW" if kind == "vit" else "channels_last"}
    log = "".join(path.read_text() for path in (tmp_path / "whole").glob("*/*.log"))
    assert ("no instructions for bfloat16" in log) == (kind != "resnet")
    checkpoint = tmp_path / "whole/epoch_1.pth"
    # A GPU's loss scaler would refuse the state of one that is off.
    assert "loss_scaler" not in torch.load(checkpoint, weights_only=False)["optimizer"]
    train(kind, shapes, tmp_path / "on", mixed=True, resume=True, load_from=str(checkpoint))
    assert_same_training(tmp_path / "on/epoch_2.pth", tmp_path / "whole/epoch_2.pth")


def test_amp_of_a_config_on_a_cpu():
    def wrapper(amp: bool = False, **own) -> dict:
        cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type="SGD", lr=1), **own)))
        set_amp(cfg, amp)
        return cfg.optim_wrapper

    assert wrapper(type="AmpOptimWrapper", dtype="bfloat16").type == "mmrla.AmpOptimWrapper"
    assert wrapper(amp=True).type == "mmrla.AmpOptimWrapper"
    assert "type" not in wrapper()
    with pytest.raises(ValueError, match="a CPU is bfloat16, got optim_wrapper.dtype='float16'"):
        wrapper(amp=True, dtype="float16")
    with pytest.raises(ValueError, match="evaluates classifiers only: a detector's boxes"):
        set_test_amp(Config(dict(default_scope="mmdet")))
    parameters = dict(optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1))
    with pytest.raises(ValueError, match=r"got optim_wrapper.dtype='torch.float16'"):
        AmpOptimWrapper(dtype=torch.float16, **parameters)


def test_the_switch_wins_over_the_config():
    for given, own, expected in (
        (None, [], None),
        (False, [], False),
        (None, [dict(type="mmrla.ChannelsLastHook", enabled=True)], True),
        (False, [dict(type="mmrla.ChannelsLastHook", enabled=True)], False),
        (True, [dict(type=ChannelsLastHook, enabled=False)], True),
    ):
        cfg = Config(dict(custom_hooks=[dict(type="EMAHook"), *own]))
        set_layout(cfg, given)
        ema, hook = cfg.custom_hooks
        assert ema.type == "EMAHook"
        assert hook.enabled is expected


@pytest.mark.parametrize(("fp16", "enabled"), [(True, None), (False, None), (False, True)])
def test_evaluation_alone(fp16, enabled):
    """The layout of a run that does not train; a 3-D convolution is left as it is."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv3d(1, 1, 2))
    before = model[1].weight.stride()
    hook = ChannelsLastHook(enabled)
    hook.before_test(SimpleNamespace(model=model, test_loop=SimpleNamespace(fp16=fp16)))
    turned = model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert turned == bool(fp16 or enabled)
    assert model[1].weight.stride() == before


def test_layout_speed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("logging.raiseExceptions", False)  # loggers keep the stream of capsys
    config = str(ROOT / "configs/cifar/resnet20_mrla_cifar10.py")
    command = ["cost", "layout", config, "--size", "32"]
    main([*command, "--rounds", "2", "--out", str(tmp_path)])
    with (tmp_path / "layout_speed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        for what in ("train", "infer"):
            times = [float(row[f"{what} {layout} ms"]) for layout in ("channels_last", "NCHW")]
            assert min(times) > 0
            assert 0.2 < float(row[f"{what} ratio"]) / (times[0] / times[1]) < 5
    said = refusal(capsys, *command, "--rounds", 0)
    assert "--rounds must be at least 1, got 0" in said

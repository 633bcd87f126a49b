from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import LoggerHook
from mmengine.model import BaseTTAModel
from mmengine.optim import OptimWrapper
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from mmengine.visualization import BaseVisBackend
from torch import nn
from torch.utils.data import DataLoader

from mmrla.checkpoints.files import CheckpointError
from mmrla.engine import (
    CheckLoadHook,
    LayerAttentionVisHook,
    LogIntervalHook,
    TrimHeapHook,
    build_runner,
)  # fmt: skip
from mmrla.models import MRLAResNet
from tests.helpers import same
from tests.networks import LIGHT, TINY, Classifier, Detector, samples
from tests.reliability.test_long_run import resident

# --- CheckLoadHook ---


def runner(model, *, training: bool, resume: bool = False):
    # Until it trains, the runner keeps its loop as the config's dict.
    loop = object() if training else dict(type="EpochBasedTrainLoop")
    return SimpleNamespace(model=model, _resume=resume, _train_loop=loop)


def test_fine_tuning_from_a_plain_backbone_loads_what_it_reports():
    """Bare keys, which mmengine itself would load nothing of, reach the model's names."""
    plain = MRLAResNet(**TINY, layer_attention=None).state_dict()
    model = Detector()
    checkpoint = {"model": plain}
    CheckLoadHook().after_load_checkpoint(runner(model, training=True), checkpoint)
    assert checkpoint["state_dict"].keys() == {f"backbone.{k}" for k in plain}
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(model.backbone.conv1.weight, plain["conv1.weight"])


@pytest.mark.parametrize("how", [dict(training=False), dict(training=True, resume=True)])
def test_testing_and_resuming_need_every_tensor(how):
    model = Detector()
    whole = {"state_dict": model.state_dict()}
    CheckLoadHook().after_load_checkpoint(runner(model, **how), dict(whole))
    plain = {"state_dict": Detector(None).state_dict()}
    with pytest.raises(CheckpointError, match="would stay random: backbone.layer1.0.mrla"):
        CheckLoadHook().after_load_checkpoint(runner(model, **how), dict(plain))
    CheckLoadHook(["*mrla*"]).after_load_checkpoint(runner(model, **how), dict(plain))
    # and a network that has no place for layer attentions is another network
    with pytest.raises(CheckpointError, match="of layer attentions that the model has no place"):
        CheckLoadHook().after_load_checkpoint(runner(Detector(None), **how), dict(whole))


class Mirrored(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


class Semi(nn.Module):
    """Holds two networks as mmdet's teacher-student detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = Detector(), Detector()


def test_checkpoints_reach_networks_inside_others():
    """Test-time augmentation's wrapper, and both networks of a teacher-student detector."""
    trained, inner = Detector(), Detector()
    inner.test_step = None
    for model, parts in ((Mirrored(module=inner), [inner]), (semi := Semi(), semi.children())):
        checkpoint = {"state_dict": trained.state_dict()}
        CheckLoadHook().after_load_checkpoint(runner(model, training=False), checkpoint)
        load_state_dict(model, checkpoint["state_dict"], strict=True)  # as mmengine loads
        assert all(same(part, trained) for part in parts)


def test_resuming_with_another_optimizer_names_load_from():
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpoint = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    here = runner(model, training=True, resume=True)
    for parameters, fits in (
        (model.parameters(), True),
        ([{"params": [p]} for p in model.parameters()], False),
        (model.backbone.parameters(), False),
    ):
        here.optim_wrapper = OptimWrapper(torch.optim.SGD(parameters, 0.1))
        with nullcontext() if fits else pytest.raises(CheckpointError, match="load_from=CHECKPO"):
            CheckLoadHook().after_load_checkpoint(here, dict(checkpoint))


@pytest.mark.parametrize(("done", "says"), [(2, True), (1, False)])
def test_resuming_a_finished_run_says_so(done, says, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("mmrla.engine.run.hooks.print_log", lambda text, **_: said.append(text))
    loop = SimpleNamespace(max_iters=20, max_epochs=2)
    here = SimpleNamespace(train_loop=loop, _resume=True, epoch=done, iter=10 * done)
    CheckLoadHook().before_train(here)
    assert ["epoch 2 of 2, iteration 20 of 20" in text for text in said] == [True] * says


# --- LayerAttentionVisHook ---


@VISBACKENDS.register_module()
class PicturesInMemory(BaseVisBackend):
    """What a visualizer hands to its backends, TensorBoard's or another."""

    pictures: list = []

    def _init_env(self): ...

    @property
    def experiment(self):
        return self

    def add_image(self, name, image, step=0, **kwargs):
        self.pictures.append((name, image, step))


def train(tmp_path, layer_attention, hooks, name, **kwargs):
    torch.manual_seed(0)
    PicturesInMemory.pictures = []
    model = Classifier(layer_attention, **kwargs)
    backends = [dict(type="LocalVisBackend"), dict(type="PicturesInMemory")]
    Runner(
        model, str(tmp_path / name),
        train_dataloader=DataLoader(samples(), batch_size=4, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=True, max_epochs=3), randomness=dict(seed=0),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)), custom_hooks=hooks,
        visualizer=dict(type="Visualizer", vis_backends=backends),
        experiment_name=f"{tmp_path.name}_{name}",
    ).train()  # fmt: skip
    return model


@pytest.mark.parametrize(
    ("attention", "kwargs"),
    [(LIGHT, {}), (dict(type="MRLABase", head_channels=4), dict(with_cp=True, frozen_stages=1))],
)
def test_layer_attention_is_drawn_while_training(attention, kwargs, tmp_path):
    """Pictures every third iteration, and the same weights as without the hook, bit for bit."""
    hook = dict(type="mmrla.LayerAttentionVisHook", interval=3, heads=[0, 1])
    model = train(tmp_path, attention, [hook], "with", **kwargs)
    pictures = list(PicturesInMemory.pictures)
    steps = [("layer_attention", step) for step in (3, 6)]
    assert [(name, step) for name, _, step in pictures] == steps
    for _, image, _ in pictures:
        assert image.dtype.name == "uint8"
        assert image.shape[2] == 3
        assert min(image.shape[:2]) > 200
    assert (pictures[0][1] != pictures[-1][1]).any()
    files = sorted(path.name for path in tmp_path.glob("with/*/vis_data/vis_image/*.png"))
    assert files == [f"{name}_{step}.png" for name, step in steps]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain = train(tmp_path, attention, [], "without", **kwargs)
    assert same(model, plain)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad


def test_layer_attention_hook_refuses_before_training(tmp_path):
    hook = dict(type="mmrla.LayerAttentionVisHook", interval=2)
    with pytest.raises(ValueError, match="Classifier has no layer attention"):
        train(tmp_path, None, [hook], "plain")
    for name in ("interval", "heads", "max_images"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            LayerAttentionVisHook(**{name: 0})


# --- others ---


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_free_memory_inside_the_heap_goes_back():
    """Every other tensor of 32 KiB is freed: no end of the heap could be cut off."""
    tensors = [torch.ones(8192) for _ in range(6000)]
    del tensors[::2]
    before = resident()
    TrimHeapHook().after_val_epoch(None)
    assert before - resident() > 0.7 * 3000 * 2**15
    assert len(tensors) == 3000


def test_runs_without_a_gpu_trim_their_heap(monkeypatch, tmp_path):
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(Runner, "from_cfg", lambda cfg: cfg)
        cfg = Config(dict(work_dir=str(tmp_path), custom_hooks=[dict(type="EMAHook")]))
        types = [hook.type for hook in build_runner(cfg).custom_hooks]
        assert types == ["EMAHook"] + ["mmrla.TrimHeapHook"] * (not gpu)


@pytest.mark.parametrize(
    ("length", "interval", "gpu", "expected"),
    [
        (1000, 50, True, 50), (50, 50, True, 50),  # as the config says
        (49, 50, True, 4), (3, 50, True, 1),  # would log once an epoch
        (1000, 50, False, 10), (1000, 5, False, 5), (30, 10, False, 3),
    ],
)  # fmt: skip
def test_log_interval(length, interval, gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    logger = LoggerHook(interval=interval)
    hooks = [TrimHeapHook(), logger]
    LogIntervalHook().before_train(SimpleNamespace(train_dataloader=[None] * length, hooks=hooks))
    assert logger.interval == expected

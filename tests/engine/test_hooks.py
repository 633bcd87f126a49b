from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmrla.checkpoints.files import CheckpointError
from mmrla.engine import CheckLoadHook
from mmrla.models import MRLAResNet

SMALL = dict(depth=18, stem_channels=8, base_channels=8)
LIGHT = dict(type="MRLALight", head_channels=4)


class Detector(nn.Module):
    def __init__(self, layer_attention) -> None:
        super().__init__()
        self.backbone = MRLAResNet(**SMALL, layer_attention=layer_attention)
        self.neck = nn.Linear(2, 2)


def runner(model, *, training: bool, resume: bool = False):
    # Until it trains, the runner keeps its loop as the config's dict.
    loop = object() if training else dict(type="EpochBasedTrainLoop")
    return SimpleNamespace(model=model, _resume=resume, _train_loop=loop)


def test_fine_tuning_from_a_plain_backbone_loads_what_it_reports():
    """Bare keys, which mmengine itself would load nothing of, reach the model's names."""
    plain = MRLAResNet(**SMALL, layer_attention=None).state_dict()
    model = Detector(LIGHT)
    checkpoint = {"model": plain}
    CheckLoadHook().after_load_checkpoint(runner(model, training=True), checkpoint)
    assert checkpoint["state_dict"].keys() == {f"backbone.{k}" for k in plain}
    model.load_state_dict(checkpoint["state_dict"], strict=False)
    assert torch.equal(model.backbone.conv1.weight, plain["conv1.weight"])


@pytest.mark.parametrize("how", [dict(training=False), dict(training=True, resume=True)])
def test_testing_and_resuming_need_every_tensor(how):
    model = Detector(LIGHT)
    whole = {"state_dict": model.state_dict()}
    CheckLoadHook().after_load_checkpoint(runner(model, **how), dict(whole))
    plain = {"state_dict": Detector(None).state_dict()}
    with pytest.raises(CheckpointError, match="would stay random: backbone.layer1.0.mrla"):
        CheckLoadHook().after_load_checkpoint(runner(model, **how), dict(plain))
    CheckLoadHook(["*mrla*"]).after_load_checkpoint(runner(model, **how), dict(plain))
    # and a network that has no place for layer attentions is another network
    with pytest.raises(CheckpointError, match="of layer attentions that the model has no place"):
        CheckLoadHook().after_load_checkpoint(runner(Detector(None), **how), dict(whole))

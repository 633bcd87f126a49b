"""Small networks with layer attention, for tests of what loads and trains networks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel, BaseModule
from torch import nn

from mmrla.models import MRLAResNet

LIGHT = dict(type="MRLALight", head_channels=4)
TINY = dict(depth=18, stem_channels=8, base_channels=8)


class Classifier(BaseModel):
    """Of images of the same size; samples have a ``label``. Weights stay as a test sets them."""

    def __init__(self, layer_attention: Any = LIGHT, **kwargs: Any) -> None:
        super().__init__(BaseDataPreprocessor())
        self.backbone = MRLAResNet(**TINY, layer_attention=layer_attention, **kwargs)

    def init_weights(self) -> None: ...

    def extract_feat(self, inputs: Any) -> Any:
        return self.backbone(torch.stack(list(inputs)))

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        features = self.extract_feat(inputs)[-1].mean((2, 3))
        if mode != "loss":
            return features
        return dict(loss=F.cross_entropy(features, torch.tensor([s.label for s in data_samples])))


class Neck(BaseModule):
    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.lateral = nn.Conv2d(64, 8, 1)
        self.norm = nn.BatchNorm2d(8)


class Head(BaseModule):
    def __init__(self, classes: int, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.shared = nn.Linear(8, 8)
        self.fc_cls = nn.Linear(8, classes)


class Detector(BaseModule):
    """A backbone, a neck and a head two levels down, each with an ``init_cfg``; never run."""

    def __init__(
        self, attention: Any = LIGHT, classes: int = 3, neck: str = "neck", init_cfg: Any = None,
        **init_cfgs: Any,
    ) -> None:  # fmt: skip
        super().__init__(init_cfg)
        of_backbone = init_cfgs.get("backbone")
        self.backbone = MRLAResNet(**TINY, layer_attention=attention, init_cfg=of_backbone)
        self.add_module(neck, Neck(init_cfgs.get("neck_init")))
        self.roi_head = BaseModule()
        self.roi_head.bbox_head = Head(classes, init_cfgs.get("bbox_head"))


def samples() -> list[dict]:
    """Eight images of noise with labels and the names of files."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 32, 32, generator=generator) for _ in range(8)]
    return [
        dict(inputs=image, data_samples=SimpleNamespace(label=i % 4, img_path=f"images/{i}.jpg"))
        for i, image in enumerate(images)
    ]

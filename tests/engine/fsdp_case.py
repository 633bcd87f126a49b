"""What test_distribution.py trains with mmengine's FlexibleRunner: NETWORK OUT, and RANK, STORE.

Without a wrapping policy in the environment's WRAP all weights are one unit. One process trains
without FSDP. Each writes its losses to OUT.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner._flexible_runner import FlexibleRunner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

import mmrla.models  # noqa: F401

STEPS, BATCH = 4, 4
SIZES = {"deit": 64, "resnet": 48}
RATES = {"deit": 0.01, "resnet": 1e-4}
NETWORKS = {
    "deit": dict(
        type="mmrla.MRLAVisionTransformer", arch="deit-tiny", img_size=64, patch_size=16,
        zero_init_mrla=False,
    ),
    "resnet": dict(
        type="mmrla.MRLAResNet", depth=18, zero_init_mrla=False,
        layer_attention=dict(type="MRLALight", head_channels=32),
    ),
}  # fmt: skip


class Images(Dataset):
    """Random images with labels of three classes."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(STEPS * BATCH, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(images=self.images[index], labels=torch.tensor(index % 3))


class Classifier(BaseModel):
    """A backbone and a linear layer; batch norms use their running statistics."""

    def __init__(self, backbone: dict) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.LazyLinear(3)

    def forward(self, images: Tensor, labels: Tensor, mode: str) -> dict[str, Tensor]:
        features = self.backbone(images)[-1]
        features = features.mean((2, 3)) if features.ndim == 4 else features
        return dict(loss=F.cross_entropy(self.head(features), labels))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class Losses(Hook):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.found.append(float(outputs["loss"]))


def main(name: str, out: str) -> None:
    torch.set_num_threads(1)
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    model = Classifier(NETWORKS[name])
    size = SIZES[name]
    model(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long), "loss")
    wrapper = dict(
        type="MMFullyShardedDataParallel", use_orig_params=True, device_id=torch.device("cpu")
    )
    if "WRAP" in os.environ:
        least = int(os.environ["WRAP"])
        policy = "torch.distributed.fsdp.wrap.size_based_auto_wrap_policy"
        wrapper["auto_wrap_policy"] = dict(type=policy, min_num_params=least)
    strategy = dict(type="FSDPStrategy", model_wrapper=wrapper)
    losses = Losses()
    runner = FlexibleRunner(
        model, work_dir=str(Path(out).parent / f"run{rank}"), experiment_name=f"{name}{rank}",
        strategy=strategy if world > 1 else dict(type="SingleDeviceStrategy"),
        train_dataloader=dict(
            dataset=Images(size), sampler=dict(type="DefaultSampler", shuffle=False),
            batch_size=BATCH // world, num_workers=0, collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1), randomness=dict(seed=0),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=RATES[name], momentum=0.9)),
        default_hooks=dict(checkpoint=None, logger=None, timer=None), custom_hooks=[losses],
    )  # fmt: skip
    runner.train()
    units = sum(type(m).__name__ == "MMFullyShardedDataParallel" for m in runner.model.modules())
    inner = sum("FullyShardedDataParallel" in type(m).__name__ for m in runner.model.modules())
    Path(f"{out}.{rank}").write_text(json.dumps(dict(losses=losses.found, units=max(units, inner))))


if __name__ == "__main__":
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    os.environ.setdefault("LOCAL_RANK", str(rank))
    store = dist.FileStore(os.environ["STORE"], world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    main(*sys.argv[1:])
    dist.destroy_process_group()

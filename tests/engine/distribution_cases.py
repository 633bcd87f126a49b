"""The cases that test_distribution.py runs in several processes, which all compare; float64."""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from mmrla.engine import use_channels_last
from mmrla.layers import MRLABase, MRLALight
from mmrla.models import MRLAResNet
from tests.conftest import flat
from tests.helpers import filled, same
from tests.models.test_wrapper import BACKBONES, wrapped
from tests.models.zoo import HOSTS, INTERACTIONS, KINDS, TYPES, build

# In each host some that end before its last stage or block, its last, and several.
OUT_INDICES = {
    "resnet": [(0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3)],
    "resnext": [(0,), (1, 2), (3,), (0, 1, 2, 3)],
    "resnet20": [(0,), (1,), (2,), (0, 1, 2)],
    "efficientnet": [(0,), (1,), (3,), (5,), (6,), (2, 3, 4, 5), (2, 3, 4, 6)],
    "vit": [(0,), (2,), (4,), (1, 2), (1, 3, 4)],
    "distilled": [(0,), (2,), (4,), (1, 3, 4)],
    "ceit": [(0,), (2,), (4,), (1, 3, 4)],
    "pvtv2": [(0,), (1,), (3,), (0, 1), (0, 1, 2, 3)],
}


def fill(model: nn.Module) -> nn.Module:
    return filled(model.train()).double()


def freeze_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def loss_of(outs) -> Tensor:
    """A mean over the batch, so that the mean over processes is that of the global batch."""
    return sum(o.square().mean() + o.mean() for o in flat(outs))


def images(count: int = 4) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, 3, 64, 64, dtype=torch.float64)


def gradients_of(model: nn.Module, x: Tensor, parallel: bool = True) -> dict[str, Tensor]:
    """Of a loss; of this process's part of the batch if parallel."""
    loss_of(model(my_part(x) if parallel else x)).backward()
    return gradients(model)


def my_part(x: Tensor) -> Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        k.removeprefix("module."): p.grad.clone()
        for k, p in model.named_parameters()
        if p.grad is not None
    }


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert got.keys() == expected.keys(), (where, got.keys() ^ expected.keys())
    assert expected
    scale = max(e.abs().max().item() for e in expected.values())
    for key, value in expected.items():
        error = (got[key] - value).abs().max().item()
        # Of its own size, or of rounding beside the largest.
        bound = 1e-9 * value.abs().max().item() + 1e-13 * scale
        assert error <= bound, (where, key, error, value.abs().max().item(), scale)


def networks(every: bool):
    """Every host, with both kinds of MRLA or one of them in turn, and wrapped backbones."""
    for number, host in enumerate(HOSTS):
        for kind in KINDS if every else KINDS[number % 2 :][:1]:
            # mmpretrain resizes position embeddings in float32.
            more = dict(img_size=64) if "img_size" in HOSTS[host][1] else {}
            more["drop_path_rate"] = 0.0
            yield f"{host} {kind}", fill(build(host, dict(type=kind), **more))
    for name in ("regnet", "swin") if every else ("regnet",):
        attention = dict(type="MRLALight", head_channels=8)
        yield f"wrapper {name}", fill(wrapped(BACKBONES[name], layer_attention=attention))


def frozen_norms(every: bool) -> None:
    """DDP's gradients are those of one process on the global batch."""
    x = images()
    for name, model in networks(every):
        alone = freeze_norms(copy.deepcopy(model))
        parallel = DistributedDataParallel(freeze_norms(model))
        assert_close(gradients_of(parallel, x), gradients_of(alone, x, parallel=False), name)


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's, whose kernels are for GPUs, written out: statistics of the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        factor = self.weight * (var + self.eps).rsqrt()
        return centred * factor[:, None, None] + self.bias[:, None, None]


def sync_norms(every: bool) -> None:
    """SyncBN in a host: no tail goes past it, gradients and statistics of the global batch."""
    tails = []
    for cls in (MRLALight, MRLABase):
        own = cls.tail
        cls.tail = lambda *args, own=own: (tails.append(1), own(*args))[1]
    x = images()
    for kind in KINDS:
        for depth, more in ((18, {}), (18, dict(with_cp=True)), (50, {}))[: 3 if every else 2]:
            config = dict(
                depth=depth, stem_channels=16, base_channels=16, out_indices=(0, 1, 2, 3),
                layer_attention=dict(type=kind, head_channels=8), **more,
            )  # fmt: skip
            synced = MRLAResNet(**config, norm_cfg=dict(type="SyncBN"))
            norms = [m for m in synced.modules() if isinstance(m, nn.SyncBatchNorm)]
            assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())
            assert any("bn_mrla" in n for n, m in synced.named_modules() if m in norms)
            alone = fill(MRLAResNet(**config))
            synced.load_state_dict(fill(synced).state_dict())
            assert same(synced, alone)
            # DDP refuses SyncBN on the CPU by its class, so it gets that afterwards.
            for norm in norms:
                norm.__class__ = nn.BatchNorm2d
            parallel = DistributedDataParallel(synced)
            for norm in norms:
                norm.__class__ = SyncBatchNorm
            tails.clear()
            got = gradients_of(parallel, x)
            assert not tails
            where = f"SyncBN {kind} {config}"
            assert_close(got, gradients_of(alone, x, parallel=False), where)
            if not more:  # recomputation moves statistics a second time
                statistics = [
                    {k: v.double() for k, v in m.named_buffers()} for m in (synced, alone)
                ]
                assert_close(*statistics, where)
                with torch.no_grad():
                    for got, want in zip(synced.eval()(x), alone.eval()(x), strict=True):
                        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def unused(every: bool) -> None:
    """DDP without find_unused_parameters raises in the second step where one had no part."""
    torch.manual_seed(0)
    small, x = torch.randn(2, 3, 40, 32), torch.randn(2, 3, 64, 64)
    tried = 0

    def two_steps(model: nn.Module, images: Tensor, where: object) -> None:
        nonlocal tried
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):
            parallel.zero_grad()
            gradients_of(parallel, images)
        asking = {k for k, p in model.named_parameters() if p.requires_grad}
        assert gradients(model).keys() == asking, where
        tried += 1

    kinds = {**TYPES, **{kind: dict(type=kind) for kind in KINDS}, "none": None}
    for host in HOSTS:
        for out_indices in OUT_INDICES[host]:
            found = dict(kinds)
            if host in ("resnet", "resnet20"):
                found |= {cfg["type"]: cfg for cfg in INTERACTIONS.values()}
            names = list(found)
            for name in names if every else [names[tried % len(names)]]:
                model = build(host, found[name], out_indices=out_indices)
                two_steps(model, small, (host, name, out_indices))
    light = dict(type="MRLALight", head_channels=8)
    for name in BACKBONES if every else ("regnet", "swin"):
        for more in ({}, dict(out_indices=(0,))):
            model = wrapped({**BACKBONES[name], **more}, layer_attention=light)
            # Some norms need more than one value a channel.
            two_steps(model, torch.cat([x, x]), (name, more))
    print(f"{tried} combinations")


def checkpointing(every: bool) -> None:
    """``with_cp`` changes no gradient under DDP, norms in training."""
    x = images()
    hosts = ("resnet", "efficientnet", "resnext", "resnet20")
    for host in hosts if every else hosts[:2]:
        for kind in KINDS:
            models = [fill(build(host, dict(type=kind), with_cp=cp)) for cp in (False, True)]
            results = [gradients_of(DistributedDataParallel(model), x) for model in models]
            assert_close(*results, f"{host} {kind}")


def accumulation(every: bool) -> None:
    """Four small batches by mmengine's wrapper make the step of the big one, norms frozen."""
    x = images(4 * dist.get_world_size())
    for kind in KINDS:
        model = freeze_norms(fill(build("resnet", dict(type=kind))))
        alone, small = copy.deepcopy(model), MMDistributedDataParallel(model)
        big = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
        wrapper = OptimWrapper(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), accumulative_counts=4
        )
        wrapper.initialize_count_status(small, 0, 8)
        for step in range(2):
            batch = x.roll(step, 0)
            big.zero_grad()
            loss_of(alone(batch)).backward()
            big.step()
            for part in batch.chunk(4):
                with wrapper.optim_context(small):
                    loss = loss_of(small(my_part(part)))
                wrapper.update_params(loss)
        assert_close(dict(model.named_parameters()), dict(alone.named_parameters()), kind)


def channels_last(every: bool) -> None:
    """A network that is turned after DDP was made, as a hook must: also the first step is right."""
    x = images()
    for kind in KINDS if every else KINDS[:1]:
        for find_unused in (False, True):
            model = freeze_norms(fill(build("resnet", dict(type=kind))))
            alone = copy.deepcopy(model)
            expected = gradients_of(alone, x, parallel=False)
            parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
            use_channels_last(parallel)
            for _ in range(3):
                parallel.zero_grad()
                assert_close(gradients_of(parallel, x), expected, f"{kind} {find_unused}")
            weight = model.layer1[0].conv2.weight
            assert weight.grad.stride() == weight.stride() != alone.layer1[0].conv2.weight.stride()


CASES = {
    f.__name__: f
    for f in (frozen_norms, sync_norms, unused, checkpointing, accumulation, channels_last)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in sys.argv[1:]:
        CASES[case]("EVERY" in os.environ)
        print(f"{case}: passed", flush=True)
    dist.destroy_process_group()

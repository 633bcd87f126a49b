"""mmrla.timm: timm's networks with a layer attention."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="requirements/extras.txt is not installed")

import mmrla.timm  # noqa: E402, F401
from mmrla.layers import MRLALight  # noqa: E402
from mmrla.ops import mrla_base_tail, mrla_light_tail  # noqa: E402
from tests.conftest import filled, needs_new_compiler, relative_error  # noqa: E402

PLAIN = sorted(
    {name.rpartition("_mrla_")[0] for name in timm.list_models("*_mrla_*", include_tags=False)}
)
TINY = dict(layers=(1, 2, 1, 1), channels=(32, 32, 64, 64), num_classes=5)
SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_classes=5)
ATTENTIONS = ("MRLALight", "MRLABase", "MLA", "LinearRLA", "DWConv", "DLALight", "DLABase")


def create(name: str, *, released: bool = False, **kwargs) -> nn.Module:
    """A small network; ``released``: with values everywhere that could hide a mistake."""
    small = SMALL_VIT if "it" in name.split("_")[0] else TINY
    torch.manual_seed(0)
    model = timm.create_model(name, **{**small, **kwargs})
    return filled(model) if released else model


def image(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_needs_no_mm_package():
    code = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmpretrain'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import timm, torch, mmrla.timm
model = timm.create_model('resnet18_mrla_base', num_classes=3)
print(tuple(model(torch.rand(2, 3, 32, 32)).shape), len(mmrla.timm.to_mmrla(model.state_dict())))
"""
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    keys = len(timm.create_model("resnet18_mrla_base").state_dict())
    assert out == f"(2, 3) {keys}\n"


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "mmrla.timm")
    with pytest.raises(ImportError, match=r"mmrla\.timm needs timm.*mmrla\[timm\]"):
        import mmrla.timm  # noqa: F401


LARGE = re.compile("101|152|large|384|deit3_base")


@pytest.mark.parametrize(
    "plain",
    [pytest.param(name, marks=[pytest.mark.slow] if LARGE.search(name) else []) for name in PLAIN],
)
def test_every_name_is_the_plain_network_and_more(plain):
    """The tables of arguments are timm's: the same keys and shapes, weights and preprocessing."""
    expected = timm.create_model(plain, device="meta")
    model = timm.create_model(f"{plain}_mrla_base", device="meta")
    state = {k: v.shape for k, v in model.state_dict().items()}
    own = {k: v.shape for k, v in expected.state_dict().items()}
    assert {k: v for k, v in state.items() if "mrla" not in k} == own
    blocks = len({k for k in state if k.endswith("query.weight")})
    assert blocks == len({k for k in own if re.search(r"(\.conv2|\.mlp\.fc2)\.weight$", k)})
    cfg = {**expected.pretrained_cfg, "architecture": f"{plain}_mrla_base"}
    assert model.pretrained_cfg == cfg
    light = timm.models.get_pretrained_cfg(f"{plain}_mrla_light").to_dict()
    assert light == {**cfg, "architecture": f"{plain}_mrla_light"}


def test_list_of_names():
    assert len(PLAIN) > 30
    weights = timm.list_models("resnet50_mrla_light*", pretrained=True)
    assert {"resnet50_mrla_light.a1_in1k", "resnet50_mrla_light.a2_in1k"} <= set(weights)
    assert timm.models.get_pretrained_cfg("resnet50_mrla_light.a2_in1k").hf_hub_id == (
        "timm/resnet50.a2_in1k"
    )


START = ["resnet18", "resnet50d", "resnext50_32x4d", "vit_tiny_patch16_224",
         "deit_tiny_distilled_patch16_224"]  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("suffix", ["mrla_light", "mrla_base"])
@pytest.mark.parametrize("plain", START)
def test_starts_as_the_plain_network(plain, suffix, training):
    """Bit for bit, and leaves that start: gradients reach what was zero."""
    reference = create(plain, released=True).train(training)
    model = create(f"{plain}_{suffix}").train(training)
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert unexpected == []
    assert missing
    assert all("mrla" in key for key in missing)
    out = model(image())
    assert torch.equal(out, reference(image()))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in reference.state_dict().items())
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("bn_mrla.weight", "mrla.norm.weight")):
            assert parameter.grad.any(), name
    released = create(f"{plain}_{suffix}", zero_init_mrla=False).train(training)
    released.load_state_dict(reference.state_dict(), strict=False)
    assert not torch.allclose(released(image()), out)


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.parametrize("name", ["resnet18_mrla_light", "resnet18_mrla_base"])
def test_features(name, feature_cls):
    whole = create(name, released=True).eval()
    kwargs = dict(features_only=True, feature_cls=feature_cls, out_indices=(1, 2, 3, 4))
    model = create(name, **kwargs).eval()
    prefix = next(iter(model.state_dict())).removesuffix("conv1.weight")
    own = {f"{prefix}{k}": v for k, v in whole.state_dict().items() if not k.startswith("fc.")}
    model.load_state_dict(own)
    found = model(image())
    found = list(found.values()) if isinstance(found, dict) else found
    expected = whole.forward_intermediates(image(), (1, 2, 3, 4), intermediates_only=True)
    assert all(map(torch.equal, found, expected))
    assert [f.shape[1] for f in found] == list(model.feature_info.channels())
    assert torch.equal(expected[-1], whole.forward_features(image()))


@pytest.mark.parametrize("distilled", ["", "distilled_"])
def test_intermediates_of_vits_are_timms(distilled):
    """At the plain network's start, with all options: timm's own outputs."""
    name = f"deit_tiny_{distilled}patch16_224"
    plain = create(name, released=True).eval()
    model = create(f"{name}_mrla_base").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    options = dict(
        indices=[None, 2, [0, 3]], return_prefix_tokens=[False, True], norm=[False, True],
        stop_early=[False, True], output_fmt=["NCHW", "NLC"], intermediates_only=[False, True],
        output_dict=[False, True],
    )  # fmt: skip
    pixels = image()
    for values in list(itertools.product(*options.values()))[::7]:
        given = dict(zip(options, values, strict=True))
        with torch.no_grad():
            got = torch.utils._pytree.tree_flatten(model.forward_intermediates(pixels, **given))
            want = torch.utils._pytree.tree_flatten(plain.forward_intermediates(pixels, **given))
        assert got[1] == want[1], given
        assert all(map(torch.equal, got[0], want[0])), given


def test_vit_of_open_sizes_registers_and_masks():
    kwargs = dict(dynamic_img_size=True, reg_tokens=2, drop_path_rate=0.1)
    plain = create("vit_tiny_patch16_224", released=True, **kwargs).eval()
    model = create("vit_tiny_patch16_224_mrla_light", **kwargs).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    pixels = torch.rand(2, 3, 40, 24)  # 15 patches, no square
    mask = torch.zeros(1, 1, 18, 18)
    mask[..., -4:] = -1e4
    for given in ({}, dict(attn_mask=mask)):
        want = plain.forward_features(pixels, **given)
        assert torch.equal(model.forward_features(pixels, **given), want)
    released = create("vit_tiny_patch16_224_mrla_light", released=True, **kwargs).eval()
    # A map that is turned is another map: patches lie in it as in the image.
    turned = released.forward_intermediates(pixels, 1, intermediates_only=True)[0]
    assert turned.shape == (2, 32, 5, 3)


@pytest.mark.parametrize("name", ["resnet18_mrla_light", "resnet18_mrla_base",
                                  "deit_tiny_patch16_224_mrla_base"])  # fmt: skip
def test_checkpointing_and_drop_path(name):
    """The same draw gives the same output and gradients; drop path drops the attention too."""
    model = create(name, released=True, drop_path_rate=0.4, mrla_drop_path_rate=0.3).train()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        out = model(image(batch=4))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(map(torch.equal, *results))
    torch.manual_seed(4)
    assert not torch.equal(model(image(batch=4)), results[0][0])
    assert sum("mrla" in n and type(m).__name__ == "DropPath" and m.drop_prob == 0.3
               for n, m in model.named_modules()) == 5  # fmt: skip
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match="reentrant"):
            model.set_grad_checkpointing()
    finally:
        timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize(("suffix", "op"), [("light", mrla_light_tail), ("base", mrla_base_tail)])
def test_fused_operations_run(suffix, op, monkeypatch):
    calls = []
    backend = op.backends["fused"]

    def spy(*args, **kwargs):
        calls.append(args[0].shape)
        return backend.fn(*args, **kwargs)

    monkeypatch.setitem(op.backends, "fused", dataclasses.replace(backend, fn=spy))
    model = create(f"resnet18_mrla_{suffix}", released=True).train()
    got = model(image())
    assert len(calls) == 5  # one per block
    fallen = create(f"resnet18_mrla_{suffix}", released=True).train()
    for module in fallen.modules():  # a hook would miss what is fused, so nothing is
        module.register_forward_hook(lambda *_: None)
    assert relative_error(fallen(image()), got) < 1e-5
    assert len(calls) == 5
    create(f"resnet18_mrla_{suffix}", norm_layer="groupnorm", num_classes=0)(image())
    assert len(calls) == 5


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_layer_attentions_by_name(attention):
    """All that sit after a layer: each parameter gets a gradient, each group shares its parts."""
    kwargs = dict(layer_attention=attention, layers=(2, 2, 2, 2))
    model = create("resnet18_mrla_light", released=True, **kwargs).train()
    model(image()).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    first, second = model.layer2
    assert type(first.mrla).__name__ == attention
    for part in first.mrla.shared:
        assert getattr(first.mrla, part) is getattr(second.mrla, part)
    assert len({key for key in model.state_dict() if ".cell." in key and "layer2.1" in key}) == 0
    config = dict(type=MRLALight, head_channels=4, recurrence="output")
    vit = create("vit_tiny_patch16_224_mrla_base", layer_attention=config)
    assert vit.blocks[0].mrla.attention.head_channels == 4
    if not first.mrla.shared:
        vit = create("vit_tiny_patch16_224_mrla_base", layer_attention=attention, released=True)
        vit(image()).square().sum().backward()
        assert [n for n, p in vit.named_parameters() if p.grad is None] == []


BAD = [
    ("resnet18_mrla_light", dict(layer_attention="MRLAlight"), ValueError, "allowed: DLABase, "),
    ("resnet18_mrla_light", dict(layer_attention=3), TypeError, "must be None or a dict"),
    ("resnet18_mrla_light", dict(layer_attention="DIAUnit"), ValueError, "on the residual branch"),
    ("resnet18_mrla_light", dict(layer_attention=dict(type="MLA", heads=3)), TypeError, "heads"),
    ("resnet18_mrla_light", dict(mrla_drop_path_rate=1.0), ValueError, r"in \[0, 1\), got 1.0"),
    ("resnet18_mrla_light", dict(block=nn.Identity), ValueError, "got Identity"),
    ("vit_tiny_patch16_224_mrla_light", dict(layer_attention="DLALight"), ValueError, "shares"),
    ("vit_tiny_patch16_224_mrla_light", dict(mrla_group_size=0), ValueError, "at least 1, got 0"),
    ("vit_tiny_patch16_224_mrla_light", dict(patch_drop_rate=0.1), ValueError, "patch_drop_rate"),
    ("vit_tiny_patch16_224_mrla_light", dict(features_only=True, feature_cls="hook"), ValueError,
     "must be 'getter'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "error", "message"), BAD)
def test_bad_arguments(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        create(name, **kwargs)


def test_traces():
    model = create("resnet18_mrla_base", released=True).eval()
    traced = torch.jit.trace(model, image(), check_trace=False)
    assert relative_error(traced(image(64, 3)), model(image(64, 3))) < 1e-5


@pytest.mark.slow
@needs_new_compiler
@pytest.mark.parametrize("name", ["resnet18_mrla_light", "resnet18_mrla_base",
                                  "deit_tiny_patch16_224_mrla_light"])  # fmt: skip
def test_compiles_to_one_graph_and_exports(name):
    model = create(name, released=True).eval()
    pixels = image()
    exported = torch.export.export(model, (pixels,)).module()
    assert relative_error(exported(pixels), model(pixels)) < 1e-5
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(compiled(pixels), model(pixels)) < 1e-5
    compiled.train()
    compiled(pixels).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@needs_new_compiler
@pytest.mark.parametrize("name", ["resnet18_mrla_light", "deit_tiny_patch16_224_mrla_base"])
def test_compiled_code(name):
    """By inductor, with gradients."""
    model = create(name, released=True).eval()
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        out = run(image())
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for got, want in zip(*reversed(results), strict=True):
        assert relative_error(got, want) < 1e-3

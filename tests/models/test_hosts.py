"""What all hosts keep, with every layer attention that they take."""

from __future__ import annotations

import re

import cv2
import pytest
import torch
from torch import nn

from mmrla.layers import DIAUnit, DLABase, DLALight, DWConv, LayerAttention
from mmrla.layers import RecurrentLayerAggregation as RLA
from mmrla.models import (
    CeiT,
    MRLACeiT,
    MRLAEfficientNet,
    MRLAPyramidVisionTransformerV2,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAVisionTransformer,
    SimpleFeaturePyramid,
    warm_start,
)
from tests.conftest import HALVES, filled, flat, needs_new_compiler
from tests.models.zoo import (
    CEIT,
    HOSTS,
    INTERACTIONS,
    MRLA,
    RELU,
    SMALL,
    TYPES,
    VIT,
    after_step,
    assert_same,
    attentions,
    build,
    plain,
    starting_from,
    step,
)

RESNETS = ("resnet", "resnext", "resnet20")
ANCESTORS = [*HOSTS, "resnet50", "resnext50", "lite0", "vit-featmap", "ceit-featmap"]
EFFECTS = [*HOSTS, "lite0", "vit-featmap", "ceit-featmap"]


@pytest.mark.parametrize("name", ANCESTORS)
def test_without_layer_attention_it_is_its_ancestor(name):
    """Keys, outputs at odd sizes, gradients and running statistics, bit for bit."""
    theirs, ours = filled(plain(name)), build(name, None)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    shapes = {k: v.shape for k, v in state.items()}
    for kind in (*MRLA, *(INTERACTIONS if name in RESNETS else ())):
        found = {k: v.shape for k, v in build(name, kind).state_dict().items()}
        assert shapes.items() <= found.items()
        assert all("mrla" in key for key in found.keys() - shapes.keys())
    ours.load_state_dict(state)
    for size in ((64, 64), (33, 70)):
        x = torch.randn(2, 3, *size)
        for mode in (True, False):
            for model in (theirs, ours):
                model.train(mode)
                model.zero_grad()
            assert_same(after_step(ours, x), after_step(theirs, x), 0)


def types_for(name: str) -> list[str]:
    """All in one host of maps and one of tokens, those with different states in the others."""
    return list(TYPES if name in ("resnet20", "vit") else ("mla", "output", "fc", "kcla"))


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, attention) for name in HOSTS for attention in (*MRLA, *types_for(name))),
        *((name, attention) for name in RESNETS for attention in INTERACTIONS),
        *((name, attention) for name in EFFECTS[len(HOSTS) :] for attention in MRLA),
    ],
)
def test_a_training_step(name, attention):
    """A gradient in every parameter, also in half precision; eval mode is a function."""
    more = dict(drop_path_rate=0.1, mrla_drop_path_rate=0.3)
    if attention in INTERACTIONS:
        more = dict(mrla_act_cfg=RELU) if attention in ("dla-base", "kcla-spanning") else {}
    model = build(name, attention, **more)
    model.init_weights()
    x = torch.randn(3, 3, 40, 32)
    for dtype in (None, *(HALVES if attention in MRLA else ())):
        model.zero_grad()
        outs = step(model.train(), x, dtype)
        assert all(o.isfinite().all() for o in outs)
        assert not [k for k, p in model.named_parameters() if p.grad is None]
        assert all(p.grad.isfinite().all() for p in model.parameters())
    if name in RESNETS:
        assert outs[-1].shape[1] == model.feat_dim
    filled(model).eval()  # a branch that starts at zero would hide what drops it
    with torch.no_grad():
        assert all(map(torch.equal, flat(model(x)), flat(model(x))))
    cfg, default = {**MRLA, **TYPES, **INTERACTIONS}[attention], HOSTS.get(name, (0, 0, 16))[2]
    # Types have defaults where the host has none.
    own = {("resnet20", "kcla"): 64, ("resnet20", "base"): 16, ("lite0", attention): 8}
    default = own.get((name, attention), default)
    for layer in attentions(model):
        assert type(layer).__name__ == cfg["type"]
        if not isinstance(layer, DWConv | DIAUnit | RLA):
            wanted = cfg.get("head_channels", default)
            wanted = layer.channels if wanted == "all" else min(wanted, layer.channels)
            assert layer.head_channels == wanted


@pytest.mark.parametrize("host", ["resnet", "vit"])
@pytest.mark.parametrize("attention", TYPES)
def test_started_as_identity_it_is_the_plain_network_and_grows_in(host, attention):
    model, without = build(host, attention), build(host, None)
    assert not without.load_state_dict(model.state_dict(), strict=False).missing_keys
    for part in model.modules():
        if hasattr(part, "start_as_identity"):
            part.start_as_identity()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert all(map(torch.equal, flat(model.eval()(x)), flat(without.eval()(x))))
    step(model.train(), x)
    ends = ("mrla.norm.weight", "bn_mrla.weight")
    norms = [p for k, p in model.named_parameters() if k.endswith(ends)]
    assert norms
    assert all(p.grad.any() for p in norms)


@pytest.mark.parametrize("host", HOSTS)
def test_init_weights_starts_as_the_plain_network_unless_told(host, tmp_path):
    without = build(host, None)
    without.init_weights()
    cfg = starting_from(without.state_dict(), tmp_path, "Pretrained")
    x = torch.randn(2, 3, 32, 32)

    def starts_as_plain(**more) -> bool:
        model = build(host, "crla", **more)
        model.init_weights()
        without.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            return all(map(torch.equal, flat(model.eval()(x)), flat(without.eval()(x))))

    assert starts_as_plain()
    assert not starts_as_plain(zero_init_mrla=False)
    # A plain checkpoint holds nothing for the layer attentions.
    assert starts_as_plain(init_cfg=cfg)
    with pytest.raises(TypeError, match="zero_init_mrla must be a bool, got 1"):
        build(host, "crla", zero_init_mrla=1)


STARTS = ["efficientnet", "lite0", "vit", "distilled", "ceit", "pvtv2"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in STARTS for kind in MRLA),
     *((name, "light") for name in ("vit-featmap", "vit-pre-norm", "vit-scaled",
                                    "efficientnet-es"))],
)  # fmt: skip
def test_warm_start_is_the_plain_network_and_all_of_mrla_moves(name, kind, tmp_path):
    theirs = filled(build(name, None)).eval()
    model = build(name, kind, init_cfg=starting_from(theirs.state_dict(), tmp_path))
    model.init_weights()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, flat(model.eval()(x)), flat(theirs(x))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(6):
        optimizer.zero_grad()
        sum(o.square().mean() for o in flat(model(x))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # Slowly at first: the norms around the attention start at zero.
    still = {k for k, p in model.named_parameters() if "mrla" in k and not p.grad.any()}
    # Where a class token alone is read, what stands behind the last self-attention does not count.
    tokens = name.startswith(("vit", "dist", "ceit")) and "featmap" not in name
    still = {k for k in still if not (tokens and k.startswith("layers.4.mrla"))}
    # A group's first layer attends to itself with weight 1 whatever its query is, and in a group
    # of one layer nobody else asks for its key.
    alone = ("query.weight", "key.weight")
    assert not {k for k in still if kind == "light" or not k.endswith(alone)}
    assert len(still) <= 8


@pytest.mark.parametrize("attention", INTERACTIONS)
def test_warm_start_of_interactions(attention, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(warm_start, "print_log", lambda text, *args, **kwargs: said.append(text))
    theirs = filled(MRLAResNet(18, **SMALL, layer_attention=None)).eval()
    init_cfg = starting_from(theirs.state_dict(), tmp_path)
    cfg = INTERACTIONS[attention]
    model = MRLAResNet(18, **SMALL, layer_attention=cfg, init_cfg=init_cfg, frozen_stages=1)
    model.init_weights()
    x = torch.randn(2, 3, 40, 56)
    same = all(
        torch.allclose(o[:, : e.shape[1]], e, rtol=1e-4, atol=1e-5 * e.abs().max().item())
        for o, e in zip(model.eval()(x), theirs(x), strict=True)
    )
    assert same is (attention != "dia")
    assert any("DIAUnit the network does not start as the plain" in t for t in said) is not same
    assert model.layer1[0].conv1.weight.requires_grad is False
    assert all(p.requires_grad for k, p in model.named_parameters() if "mrla" in k)


def test_warm_start_of_plain_ceit(tmp_path):
    theirs = filled(CeiT(**CEIT))
    model = CeiT(**CEIT, init_cfg=starting_from(theirs.state_dict(), tmp_path))
    model.init_weights()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("host", "attention"),
    [*(("resnet", a) for a in ("light", "base", "mla", "linear-rla", "dwconv", "fc", "lambda-1")),
     *(("resnet", a) for a in INTERACTIONS), ("efficientnet", "light")],
)  # fmt: skip
def test_recomputing_a_block_changes_nothing(host, attention):
    """with_cp, whose states are tuples of maps or nothing; and what norm_eval promises."""
    found = []
    for with_cp in (False, True):
        model = filled(build(host, attention, with_cp=with_cp, norm_eval=True)).double().train()
        assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        found.append(after_step(model, torch.randn(2, 3, 33, 47).double()))
        torch.manual_seed(0)
    assert_same(*found, 1e-8)


@pytest.mark.parametrize("norm_eval", [False, True])
@pytest.mark.parametrize("attention", ["light", *INTERACTIONS])
def test_frozen_stages_and_norm_eval_hold_for_the_layer_attention(attention, norm_eval):
    model = build("resnet", attention, frozen_stages=2, norm_eval=norm_eval).train()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad is not key.startswith(("conv1", "bn1", "layer1", "layer2"))
    before = {k: v.clone() for k, v in model.named_buffers()}
    step(model, torch.randn(2, 3, 32, 32))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    moved = {k.split(".")[0] for k, v in model.named_buffers() if not torch.equal(v, before[k])}
    assert moved <= (set() if norm_eval else {"layer3", "layer4", "mrla_output"})


FROZEN_LN = dict(norm_cfg=dict(type="LN", eps=1e-6, requires_grad=False))
CONSTANT = dict(type="Constant", layer="Conv2d", val=0.5)


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("resnet", dict(norm_cfg=dict(type="BN", requires_grad=False)), "[(]8: layer1.0.bn"),
        ("resnet", dict(frozen_stages=1), "[(]2: layer1.0.bn.*WarmStart.*zero_init_mrla"),
        ("pvtv2", dict(FROZEN_LN, init_cfg=CONSTANT), "[(]12: layers.0.1.0.mrla.norm"),
        ("vit", dict(frozen_stages=1), "[(]2: layers.0.mrla.norm"),
        ("resnet", dict(frozen_stages=1, zero_init_mrla=False), None),
        ("resnet", dict(out_indices=(1,)), None),  # later stages are frozen because unused
    ],
)
def test_warns_of_attention_that_is_off_for_good(name, kwargs, expected, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("mmrla.models.host.print_log", lambda text, **_: said.append(text))
    build(name, "light", **kwargs).init_weights()
    assert len(said) == (expected is not None)
    assert expected is None or re.search(expected, said[0])


@pytest.mark.parametrize("attention", [*TYPES, *INTERACTIONS])
def test_half_precision_is_finite_and_close(attention):
    model = build("resnet20", attention).train()
    x = torch.randn(4, 3, 24, 32)
    with torch.no_grad():
        expected = model(x)[-1]
    (got,) = step(model, x, torch.bfloat16)
    assert got.isfinite().all()
    assert (got.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().bfloat16()(x.bfloat16())[-1].isfinite().all()


@pytest.mark.parametrize("attention", TYPES)
def test_the_fused_tail_runs_where_it_can_and_agrees_with_the_plain_path(attention, monkeypatch):
    """Bit for bit it need not be; gradients of all parameters, float64."""
    fused, found = attention in ("crla", "one-head", "lambda-1"), []
    for backend in (None, "naive"):
        if backend:
            monkeypatch.setenv("MMRLA_BACKEND", backend)
        torch.manual_seed(5)
        model = build("resnet", attention, mrla_drop_path_rate=0.3).double().train()
        layer, norm = model.layer1[0].mrla, model.layer1[0].mrla_norm
        z = torch.randn(2, 16, 4, 4, dtype=torch.float64)
        assert layer.fuses_tail(z, model.layer1[0].last_norm, norm) == (fused and not backend)
        torch.manual_seed(6)
        found.append(after_step(model, torch.randn(3, 3, 32, 40, dtype=torch.float64)))
    assert_same(*found, 1e-9, floor=1e-3)


@needs_new_compiler
@pytest.mark.slow
@pytest.mark.parametrize("attention", TYPES)
def test_compiled_in_one_graph(attention):
    torch._dynamo.reset()
    model = build("resnet20", attention, norm_eval=True).train()
    x = torch.randn(2, 3, 16, 16)
    expected = after_step(model, x)
    model.zero_grad()
    got = after_step(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_same(got, expected, 1e-3, floor=1e-3)


def test_real_image(coco_mini):
    path = sorted((coco_mini / "val2017").glob("*.jpg"))[0]
    pixels = torch.from_numpy(cv2.imread(str(path))).permute(2, 0, 1)[None].float()
    height, width = pixels.shape[2:]
    for cfg in (*(dict(c, head_channels=8) for c in MRLA.values()), *INTERACTIONS.values()):
        outs = MRLAResNet(18, **SMALL, layer_attention=cfg).eval()((pixels - 120) / 58)
        for i, out in enumerate(outs):
            assert out.shape[2:] == (-(-height // 2 ** (i + 2)), -(-width // 2 ** (i + 2)))
            assert out.isfinite().all()
            assert out.std() > 0


@pytest.mark.parametrize("cfg", INTERACTIONS.values(), ids=INTERACTIONS)
@pytest.mark.parametrize("host", ["efficientnet", "vit", "pvtv2", "ceit"])
def test_hosts_refuse_what_they_cannot_take(host, cfg):
    with pytest.raises(
        ValueError, match=rf"MRLA\w+ cannot take layer_attention {cfg['type']}: it s"
    ):
        build(host, cfg)


def test_placements_of_other_layer_attentions_raise():
    class Nowhere(LayerAttention):
        def forward(self, x, shortcut, state):
            return x, state

    with pytest.raises(NotImplementedError, match="Nowhere"):
        Nowhere(8).at_input(torch.zeros(1), None)
    assert {DIAUnit.placement, RLA.placement} == {"branch", "input"}
    assert DLALight.placement == DLABase.placement == "after"


def test_narrow_stages_have_one_head_whatever_the_type():
    for kind, d in (("MRLALight", None), ("MLA", None), ("LinearRLA", None), ("MRLABase", 8)):
        cfg = dict(type=kind) if d is None else dict(type=kind, head_channels=d)
        found = attentions(MRLAResNetCIFAR(20, layer_attention=cfg))
        assert [m.head_channels for m in found][::3] == ([16, 32, 32] if d is None else [d] * 3)


def light(d):
    return dict(type="MRLALight", head_channels=d)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("vit", "light", mrla_group_size=0), "at least 1, got 0"),
        (lambda: build("ceit", "base", mrla_group_size=-2), "at least 1, got -2"),
        (lambda: build("vit", "light", mrla_group_size=2.0), "must be an int, got 2.0"),
        (lambda: build("pvtv2", "light", mrla_drop_path_rate=1.0), r"\[0, 1\), got 1.0"),
        (lambda: MRLAEfficientNet("b0", layer_attention=light(16)), "head_channels=16 with .*=24"),
        (lambda: build("pvtv2", light(48)), "head_channels=48 with channels="),
        (lambda: MRLACeiT("tiny", layer_attention=light(20)), "head_channels=20 with .*=192"),
        (lambda: MRLAPyramidVisionTransformerV2("b9"), "b0.*got 'b9'"),
        (lambda: CeiT("huge"), "tiny.*got 'huge'"),
        (lambda: build("ceit", None, with_cls_token=False), "no with_cls_token, got .*=False"),
        (lambda: build("ceit", None, pre_norm=True), "CeiT has no pre_norm, got pre_norm=True"),
        (lambda: build("ceit", None, layer_cfgs=[{}]), "CeiT has no layer_cfgs"),
        (lambda: build("ceit", None, layer_scale_init_value=1e-3), "CeiT has no layer_scale_init"),
        (lambda: CeiT("tiny", layer_scale_init_value=1e-3), "CeiT has no layer_scale_init_value"),
        (lambda: build("distilled", None, with_cls_token=False), "has a class token, got"),
        (lambda: MRLAResNetCIFAR(20, frozen_stages=4), "frozen_stages must be from -1 to 3, got 4"),
        (lambda: MRLAVisionTransformer(**VIT, with_cls_token=False), "with_cls_token must be True"),
        (lambda: SimpleFeaturePyramid(32, scales=(8.0,)), "4, 2, 1 and 0.5, got 8.0"),
        (lambda: SimpleFeaturePyramid(32, num_outs=2), "got 2 with"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

"""KCLA: the released layers, the equation, the end of a block, and what hosts make of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrla.analysis import activation_memory, complexity, record_layer_attention
from mmrla.layers import KCLA
from mmrla.layers.layer_attention import OpenReLU
from mmrla.models import (
    LayerAttentionWrapper,
    MRLAResNet,
    MRLAResNetCIFAR,
    MRLAVisionTransformer,
)
from mmrla.ops.kcla import KCLAState
from tests.conftest import filled, golden, needs_new_compiler, relative_error
from tests.models.test_interactions import stage
from tests.models.zoo import RELU, after_step, assert_same

RELEASED = {
    "query": "Wq", "key": "Wk", "value": "Wv", "gate": "head_att", "crossing.0": "adjust_channel",
    "crossing.1": "u_bn", "crossing_key": "u_Wk", "norm": "bn_attention",
}  # fmt: skip


class Layer(nn.Module):
    """A layer attention with what a host puts behind it."""

    def __init__(self, channels: int, crosses: int | None = None) -> None:
        super().__init__()
        self.mrla = KCLA(channels, head_channels=16)
        self.norm, self.act = nn.BatchNorm2d(channels), OpenReLU()
        if crosses:
            self.mrla.cross(crosses, 2, nn.BatchNorm2d)

    def forward(self, x, state):
        o, state = self.mrla(x, x, state)
        return self.act(self.norm(o)), state


def test_the_released_layers():
    """Outputs, states and every gradient of four layers, a stage's border between them."""
    arrays = golden("kcla", "shared")
    layers = [Layer(32), Layer(32), Layer(64, crosses=32), Layer(64)]
    state, outs, xs = None, [], []
    for t, layer in enumerate(layers, 1):
        layer.double()
        for key, parameter in layer.named_parameters():
            part, _, kind = key.removeprefix("mrla.").rpartition(".")
            name = f"layer{t}.{RELEASED[part]}.{kind}"
            parameter.data = arrays[f"param.{name}"]
            parameter.released = name
        xs.append(arrays[f"x{t}"].requires_grad_())
        out, state = layer(xs[-1], state)
        outs.append(out)
        assert relative_error(out, arrays[f"out{t}"]) < 1e-10
        u = state.mean.unflatten(1, (-1, 16)) * state.weight[..., None, None, None]
        assert relative_error(u, arrays[f"state{t}.u"]) < 1e-10
        assert relative_error(state.weight, arrays[f"state{t}.z"][..., 0, 0, 0]) < 1e-10
    torch.autograd.backward(outs, [arrays[f"grad_out{t}"] for t in range(1, 5)])
    for t, x in enumerate(xs, 1):
        assert relative_error(x.grad, arrays[f"grad_x{t}"]) < 1e-10
    parameters = [p for layer in layers for p in layer.parameters()]
    assert len(parameters) == 4 * 6 + 4
    for parameter in parameters:
        assert relative_error(parameter.grad, arrays[f"grad.{parameter.released}"]) < 1e-10


@pytest.mark.parametrize("frozen", [False, True])
def test_both_ends_agree_in_any_mode(frozen):
    """Drop path, norms in eval mode, layouts, a single pixel; float64, three layers."""
    results = []
    for backend in ("fused", "naive"):
        torch.manual_seed(1)
        layers = [KCLA(12, head_channels=4).double() for _ in range(3)]
        norms = [nn.BatchNorm2d(12).double().train(not frozen) for _ in range(6)]
        state, leaves, outs = None, [p for m in (*layers, *norms) for p in m.parameters()], []
        for t, layer in enumerate(layers):
            z, s = torch.randn(2, 4, 12, 5, 1 + t // 3, dtype=torch.double).requires_grad_()
            if t == 1:
                z = z.to(memory_format=torch.channels_last)
            drop = torch.tensor([0.0, 1.25, 1.25, 0], dtype=torch.double)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MMRLA_BACKEND", backend)
                out, state = layer.tail(z, s, state, norms[t], norms[t + 3], drop if t else None)
            outs.append(out)
            leaves += [z, s]
        loss = sum((o * o.detach().sin()).sum() for o in (*outs, *state))
        grads = torch.autograd.grad(loss, leaves)
        buffers = [b for n in norms for b in (n.running_mean, n.running_var)]
        results.append([o.detach() for o in (*outs, *state, *grads, *buffers)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-10 * want.abs().max().clamp(min=1e-3)


def network(depth=20, options=(), **kwargs):
    cfg = dict(options, type="KCLA", head_channels=16)
    return MRLAResNetCIFAR(
        depth, block="bottleneck", layer_attention=cfg, mrla_act_cfg=RELU, **kwargs
    )


@pytest.mark.parametrize("kind", ["KCLA", "DLABase"])
def test_a_relu_behind_a_zero_norm_learns(kind):
    """Started as the identity it is the plain network, and both gamma and beta have gradients."""
    model = MRLAResNetCIFAR(
        20, layer_attention=dict(type=kind, head_channels=16), mrla_act_cfg=RELU
    )
    plain = MRLAResNetCIFAR(20, layer_attention=None)
    model.init_weights()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 32, 32)
    (out,), (expected,) = model.eval()(x), plain.eval()(x)
    assert torch.equal(out, expected)
    model.train()(x)[0].square().sum().backward()
    assert all(p.grad.any() for k, p in model.named_parameters() if "bn_mrla" in k)


def test_recomputing_blocks_changes_nothing_in_bfloat16_or_float64():
    """Float64 with batch statistics of the crossing norms too."""
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.bfloat16, 2e-2)):
        grads = []
        for with_cp in (False, True):
            torch.manual_seed(0)
            model = network(with_cp=with_cp).train()
            x = torch.randn(2, 3, 16, 16)
            if dtype == torch.float64:
                model, x = model.double(), x.double()
            x.requires_grad_()
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                out = model(x)[0]
            out.float().square().mean().backward()
            grads.append([x.grad, *(p.grad for p in model.parameters())])
        assert all(a.isfinite().all() for a in grads[0])
        for a, b in zip(*grads, strict=True):
            assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("backend", ["fused", "naive"])
def test_bfloat16_is_close(backend, monkeypatch):
    monkeypatch.setenv("MMRLA_BACKEND", backend)
    model = network().train()
    x = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)[0].float()
    assert (got - expected).abs().mean() < 0.1 * expected.abs().mean()


@needs_new_compiler
def test_compiled_in_one_graph():
    torch._dynamo.reset()
    model, x = network(norm_eval=True).train(), torch.randn(2, 3, 16, 16)
    expected = after_step(model, x)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(after_step(compiled, x), expected, 1e-3)


def test_memory_does_not_grow_with_what_came_before():
    """One map beside the plain block's for each layer of a stage; the state is as large after 8."""

    def kept(blocks: int, cfg) -> int:
        act = RELU if cfg else None
        made = stage(cfg, blocks, 1, mrla_act_cfg=act).float()
        return activation_memory(made, torch.empty(2, 8, 16, 16))

    cfg = dict(type="KCLA", head_channels=4)
    one_map = 16 * 16 * 16 * 4
    layers = [kept(n, cfg) - kept(n, None) for n in (2, 4, 8)]
    assert layers[1] - layers[0] == pytest.approx(2 * one_map, rel=0.03)
    assert layers[2] - layers[1] == pytest.approx(4 * one_map, rel=0.03)
    state = None
    for _ in range(8):
        x = torch.randn(2, 16, 5, 5)
        _, state = KCLA(16, head_channels=4)(x, x, state)
    assert [s.shape for s in state] == [(2, 16, 5, 5), (2, 4)]


def test_parameters_and_work_by_hand():
    """Of ResNet-50 on ImageNet: per layer Conv1Ds, DWConv, gate and norm; three crossings."""
    stages = ((3, 256, 56, 5), (4, 512, 28, 5), (6, 1024, 14, 5), (3, 2048, 7, 7))
    params = macs = 0
    for i, (blocks, c, side, taps) in enumerate(stages):
        heads, pixels = c // 64, side * side
        params += blocks * (2 * taps + 9 * c + heads**2 + 2 * c)
        macs += blocks * (2 * taps * c + 9 * c * pixels + heads**2 + c * pixels + 2 * c * pixels)
        if i:
            params += c * (c // 2) // heads + 2 * c + taps
            macs += c * (c // 2) // heads * pixels + 3 * c * pixels + taps * c
    x = torch.rand(1, 3, 224, 224)
    plain = complexity(MRLAResNet(50, layer_attention=None), x)
    model = MRLAResNet(50, layer_attention=dict(type="KCLA"), mrla_act_cfg=RELU)
    got = complexity(model, x)
    assert got.params - plain.params == params
    assert got.macs - plain.macs == macs


def test_what_it_attends_to():
    """``o`` is the values of the stage's layers by its scores, and of what crossed the rest."""
    model = filled(network(depth=56).eval())
    seen = {}

    def hook(layer, args, output):
        seen[layer] = (*args, *output)

    with torch.no_grad(), record_layer_attention(model) as rec:
        for m in model.modules():
            if isinstance(m, KCLA):
                m.register_forward_hook(hook)
        model(torch.randn(2, 3, 20, 24))
    assert [group.name for group in rec.groups] == ["layer1", "layer2", "layer3"]
    modules = dict(model.named_modules())
    for group in rec.groups:
        assert not group.sum_to_one
        assert "gate" in group.label
        layers = [modules[name] for name in group.modules]
        carried = layers[0].crossed(seen[layers[0]][2], layers[0].crossing)
        for t, layer in enumerate(layers):
            x, _, _, o, state = seen[layer]
            scores = group.scores[:, :, t, : t + 1]
            gate = torch.sigmoid(layer._weight_and_logits(x)[1])
            rest = gate * state.weight / (state.weight + 1e-3) - scores.sum(2)
            assert (carried is None) == (rest.abs().max() < 1e-5)
            maps = [seen[earlier][0] for earlier in layers[: t + 1]]
            weights = [scores[:, :, s] for s in range(t + 1)]
            if carried is not None:
                maps, weights = [*maps, carried.mean], [*weights, rest]
            total = sum(
                w.repeat_interleave(16, 1)[..., None, None] * layer.value(m)
                for w, m in zip(weights, maps, strict=True)
            )
            assert relative_error(o, total) < 1e-4


def test_recording_in_training_counts_a_batch_once():
    model = network().train()
    with record_layer_attention(model):
        model(torch.randn(2, 3, 16, 16))
    assert model.layer2[0].mrla.crossing[1].num_batches_tracked == 1


def test_hosts_that_hand_no_state_on():
    """A clear error, and with spans_stages=False a group per stage, in the wrapper too."""
    cfg = dict(type="KCLA", head_channels=8)
    vit = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    regnet = dict(type="mmdet.RegNet", arch="regnetx_400mf")
    for build, name in (
        (lambda c: MRLAVisionTransformer(vit, 32, 8, layer_attention=c), "MRLAVisionTransformer"),
        (lambda c: LayerAttentionWrapper(dict(regnet), c, probe_size=64), "LayerAttentionWrapper"),
    ):
        with pytest.raises(ValueError, match=f"{name}.* cannot take layer_attention KCLA: .*False"):
            build(cfg)
        model = build(dict(cfg, spans_stages=False)).train()
        outs = model(torch.randn(2, 3, 32, 32))
        sum(o.square().sum() for o in outs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(
        ValueError, match="LayerAttentionWrapper.* cannot take .* DIAUnit: it sits on"
    ):
        LayerAttentionWrapper(dict(regnet), dict(type="DIAUnit"), probe_size=64)
    model = network(options=dict(spans_stages=False))
    assert not [k for k in model.state_dict() if "crossing" in k]
    timm = pytest.importorskip("timm")
    import mmrla.timm  # noqa: F401

    with pytest.raises(ValueError, match="MRLAResNet cannot take layer_attention KCLA"):
        timm.create_model("resnet18_mrla_light", layer_attention=cfg)
    # Its blocks have no activation behind the norm, which the fused end has.
    small = dict(layers=(2, 1, 1, 1), channels=(32, 32, 64, 64), num_classes=5)
    own = timm.create_model(
        "resnet18_mrla_light", layer_attention=dict(cfg, spans_stages=False), **small
    )
    block = own.layer1[0]
    assert not block.mrla.fuses_tail(torch.zeros(()), block.bn2, block.bn_mrla)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(spans_stages="no"), TypeError, "spans_stages must be a bool, got 'no'"),
        (dict(head_channels=3), ValueError, "head_channels=3 with channels=8; allowed: 1, 2, 4, 8"),
        (dict(kernel_size=4), ValueError, "kernel_size must be odd"),
        (dict(projection="fc"), TypeError, "projection"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        KCLA(8, **{"head_channels": 4, **kwargs})


def test_states_that_do_not_fit():
    layer, x = KCLA(8, head_channels=4), torch.randn(2, 8, 3, 3)
    with pytest.raises(ValueError, match=r"mean of the state must have the shape of x, got .*4, 4"):
        layer(x, x, KCLAState(torch.randn(2, 8, 4, 4), torch.ones(2, 2)))
    with pytest.raises(ValueError, match=r"weight of the state must be \(2, 2\), got \(2, 4\)"):
        layer(x, x, KCLAState(x, torch.ones(2, 4)))


def test_maps_of_zeros_have_finite_gradients():
    x = torch.zeros(2, 8, 3, 3, requires_grad=True)
    layer = KCLA(8, head_channels=4)
    o, state = layer(x, x, None)
    o, state = layer(x, x, state)
    (o.sum() + state.weight.sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())

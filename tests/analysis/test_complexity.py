from __future__ import annotations

import gc
import weakref

import pytest
import torch
from mmdet.models import PyramidVisionTransformerV2
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmpretrain.models import EfficientNet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmrla.analysis import activation_memory, complexity
from mmrla.analysis.complexity import kept_for_backward
from mmrla.layers import LayerAttention
from mmrla.models import MRLAResNet
from mmrla.ops import eca_kernel_size
from tests import conftest
from tests.helpers import classifier

LIGHT = dict(type="MRLALight", head_channels=32)
BASE = dict(type="MRLABase", head_channels=16)
HALF = dict(stem_channels=32, base_channels=32)


def deit(arch="deit-tiny", **backbone):
    cfg = dict(type="mmrla.MRLAVisionTransformer", arch=arch, patch_size=16) | backbone
    return classifier(cfg, 192 if arch == "deit-tiny" else 384, "VisionTransformerClsHead")


@pytest.mark.parametrize(
    ("depth", "layer_attention", "params", "gmacs"),
    [
        (50, None, 25_557_032, 4.112),
        (101, None, 44_549_160, 7.834),
        (50, LIGHT, 25.738e6, 4.178),
        (101, LIGHT, 44.940e6, 7.942),
        (50, BASE, 25.723e6, 4.192),
        (101, BASE, 44.907e6, 8.007),
    ],
)
def test_figures_of_the_released_networks(depth, layer_attention, params, gmacs):
    """To the last digit that is known: exact for the plain networks, else 3 decimals."""
    backbone = dict(type="mmrla.MRLAResNet", depth=depth, layer_attention=layer_attention)
    model = classifier(backbone).train()
    got = complexity(model, torch.rand(1, 3, 224, 224))
    assert got.params == sum(p.numel() for p in model.parameters())
    if layer_attention is None:
        assert got.params == params
        assert (got.attention_macs, got.elementwise_macs) == (0, 0)
    else:
        assert round(got.params / 1e6, 3) == params / 1e6
    assert round(got.macs / 1e9, 3) == gmacs
    assert model.training  # left as it was
    assert all(m.training for m in model.modules())


# Of layer t of a group with n = channels * pixels elements, kernel k and d = 8 channels a head: the
# work that is counted (GAP, query and key, their product, value, what follows), and the
# element-wise part of it.
TERMS = {
    # The gate times V, and lambda o_{t-1}.
    "MRLALight": (LIGHT, lambda t, c, n, k: (n + 2 * k * c + c + 9 * n + 2 * n, 2 * n)),
    # The weighted sum of t values.
    "MRLABase": (BASE, lambda t, c, n, k: (n + 2 * k * c + t * c + 9 * n + t * n, 0)),
    "MLA": (
        dict(type="MLA", head_channels=8),
        lambda t, c, n, k: (t * n + (1 + t) * k * c + t * c + t * 9 * n + t * n, 0),
    ),
    # U and its product with phi(Q): d * n each; phi(Q) Z is element-wise.
    "LinearRLA": (
        dict(type="LinearRLA", head_channels=8),
        lambda t, c, n, k: (n + 2 * k * c + 9 * n + 2 * 8 * n + c, c),
    ),
    "DWConv": (dict(type="DWConv"), lambda t, c, n, k: (9 * n, 0)),
    "projection": (
        dict(LIGHT, projection="fc"),
        lambda t, c, n, k: (n + 2 * c * c + c + 9 * n + 2 * n, 2 * n),
    ),
    "value_conv": (
        dict(LIGHT, value_conv=False),
        lambda t, c, n, k: (n + 2 * k * c + c + 2 * n, 2 * n),
    ),
    "recurrence": (
        dict(LIGHT, recurrence=None),
        lambda t, c, n, k: (n + 2 * k * c + c + 9 * n + n, n),
    ),
    "fixed_lambda": (
        dict(LIGHT, fixed_lambda=1),
        lambda t, c, n, k: (n + 2 * k * c + c + 9 * n + 2 * n, 2 * n),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_attention_is_counted_term_by_term(name):
    """With numbers from the equations, and beside the plain network with the norms behind it."""
    layer_attention, terms = TERMS[name]
    x = torch.rand(1, 3, 64, 96)
    got = complexity(MRLAResNet(18, layer_attention=layer_attention), x)
    expected = elementwise = norms = 0
    for channels, pixels in ((64, 384), (128, 96), (256, 24), (512, 6)):
        for t in (1, 2):
            n = channels * pixels
            work, part = terms(t, channels, n, eca_kernel_size(channels))
            expected, elementwise, norms = expected + work, elementwise + part, norms + 2 * n
    assert got.attention_macs == expected
    assert got.elementwise_macs == elementwise
    without = complexity(MRLAResNet(18, layer_attention=None), x).macs
    assert got.macs - without == expected - elementwise + norms


COUNTED = [
    LIGHT,
    dict(type="MRLALight", head_channels="all", projection="fc", recurrence="output"),
    BASE,
    dict(type="MLA"),
    dict(type="LinearRLA"),
    dict(type="DLALight"),
    dict(type="DLABase"),
    dict(type="DIAUnit"),
    dict(type="KCLA", head_channels=8),
]


@pytest.mark.parametrize("kind", COUNTED, ids=lambda kind: "-".join(map(str, kind.values())))
def test_mmengines_counter_sees_every_part(kind):
    """Its figure is ours, and query, key and value have rows of their own in its table."""
    model = MRLAResNet(18, base_channels=32, layer_attention=kind).eval()
    x = torch.rand(1, 3, 64, 96)
    info = get_model_complexity_info(model, inputs=(x,), show_arch=False)
    # what mmengine has no rule for besides is element-wise
    assert info["flops"] == complexity(model, x).macs
    analyzer = FlopAnalyzer(model, (x,))
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    rows = analyzer.by_module()
    name = "layer2.1.mrla"  # the second of its group, 64 channels of 8 x 12
    fc, channels = kind.get("projection") == "fc", 64
    product = channels * (channels if fc else eca_kernel_size(channels))
    times = 2 if kind["type"] == "MLA" else 1  # keys and values of both layers
    if hasattr(model.layer2[1].mrla, "query"):
        assert rows[f"{name}.query"] == product
        assert rows[f"{name}.key"] == product * times
        assert rows[f"{name}.value"] == channels * 9 * 8 * 12 * times
        assert f"{name}.query" not in analyzer.uncalled_modules()
    # torch's counter, of a forward that nobody traces, counts two for a multiply-add
    with FlopCounterMode(model, display=False) as counter, torch.no_grad():
        model(x)
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert convolutions == 2 * analyzer.by_operator()["conv"]


@pytest.mark.parametrize(
    ("model", "gmacs"),
    [
        (lambda: deit(layer_attention=None), 1.258),
        (lambda: deit("deit-small", type="mmpretrain.VisionTransformer"), 4.608),
        (lambda: EfficientNet("b0"), 0.400),
        (lambda: PyramidVisionTransformerV2(embed_dims=32, num_layers=[2, 2, 2, 2]), 0.572),
    ],
)
def test_attention_among_tokens_is_counted(model, gmacs):
    got = complexity(model(), torch.rand(1, 3, 224, 224))
    assert round(got.macs / 1e9, 3) == gmacs


@pytest.mark.skipif(
    not hasattr(torch.backends, "mha"), reason="torch 2.1 cannot switch its inference kernel off"
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_of_torch_is_counted(need_weights):
    """Frozen and without gradients, where it has a kernel of its own for inference."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    with torch.no_grad():
        got = complexity(Net().requires_grad_(False), torch.rand(2, 10, 32))
    assert got.macs == 2 * (4 * 10 * 32 * 32 + 2 * 10 * 10 * 32)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("kind", "params"), [("MRLALight", 5_749_792), ("MRLABase", 5_742_880)])
def test_deit_tiny(kind, params):
    model = deit(layer_attention=dict(type=kind, head_channels=16))
    got = complexity(model, torch.rand(1, 3, 64, 64))
    assert got.params == params
    assert got.skipped["gelu"] == (24 if kind == "MRLALight" else 12)
    assert {"div", "add"} <= set(got.skipped)
    assert "mul" not in got.skipped  # the attention's, which are counted


def test_what_is_skipped_is_named():
    class Gated(LayerAttention):
        def forward(self, x, shortcut, state):
            return x * shortcut, state

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Gated(4)

        def forward(self, x):
            rows, columns = x.shape[2:]
            o, _ = self.inner(x, x, None)
            return (o * x).erf().reshape(-1, rows * columns) - 1

    got = complexity(Net(), torch.rand(2, 4, 3, 5))
    assert got[1:4] == (0, 120, 120)
    assert got.skipped == {"mul": 1, "erf": 1, "sub": 1}  # none for the product of sizes


def really_kept(model, x):
    """As :func:`activation_memory`, with a real forward."""
    kept = conftest.kept_for_backward(lambda: model.train()(x))
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / len(x)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MRLAResNet(18, **HALF, layer_attention=None),
        lambda: MRLAResNet(18, **HALF, layer_attention=LIGHT, mrla_drop_path_rate=0.2),
        lambda: MRLAResNet(18, **HALF, layer_attention=BASE, with_cp=True),
        lambda: MRLAResNet(18, **HALF, layer_attention=BASE, frozen_stages=2, norm_eval=True),
        lambda: deit(drop_path_rate=0.1, img_size=64),
        lambda: PyramidVisionTransformerV2(embed_dims=32, num_layers=[1, 1, 1, 1]),
    ],
)
def test_activation_memory_is_that_of_a_real_forward(model):
    model, x = model().eval(), torch.rand(2, 3, 64, 64)
    if torch.__version__.startswith("2.1.") and "VisionTransformer" in str(model):
        pytest.skip("torch 2.1 keeps a random state with attention that a fake forward has not")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainable = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    got = activation_memory(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert got == int(really_kept(model, x))


def test_what_was_counted_is_freed():
    model, x = MRLAResNet(18, **HALF, layer_attention=LIGHT), torch.rand(2, 3, 64, 64)
    parameter = weakref.ref(next(model.parameters()))
    assert kept_for_backward(model, lambda: model(x)) > 0
    model = None
    gc.collect()
    assert parameter() is None


def test_activation_memory_of_resnet50():
    """82.1 MiB an image was measured of torchvision's, with the buffers of batch norms in it."""
    model = classifier(dict(type="mmrla.MRLAResNet", depth=50, layer_attention=None))
    got = activation_memory(model, torch.rand(2, 3, 224, 224))
    statistics = sum(
        b.nbytes for name, b in model.named_buffers() if not name.endswith("num_batches_tracked")
    )
    assert round((got + statistics / 2) / 2**20, 1) == 82.1

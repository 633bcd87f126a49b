from __future__ import annotations

import pytest
import torch

from mmrla.analysis.token_attention import record_token_attention
from mmrla.models import (
    MRLACeiT,
    MRLADistilledVisionTransformer,
    MRLAPyramidVisionTransformerV2,
    MRLAVisionTransformer,
)
from tests.conftest import relative_error

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


@pytest.mark.parametrize(
    ("cls", "kwargs", "extra"),
    [
        (MRLAVisionTransformer, dict(img_size=32, patch_size=8), 1),
        (MRLADistilledVisionTransformer, dict(img_size=32, patch_size=8), 2),
        (MRLACeiT, dict(img_size=32, patch_size=2), 1),
    ],
)
def test_is_what_the_block_computes(cls, kwargs, extra):
    """The recorded weights times the values are what the block's attention puts out."""
    model = cls(ARCH, **kwargs).eval()
    attn = model.layers[1].attn
    outputs, values = [], []
    handles = [
        attn.proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0])),
        attn.qkv.register_forward_hook(lambda module, args, out: values.append(out[..., 64:])),
    ]
    with torch.no_grad(), record_token_attention(model, 1) as rec:
        model(torch.randn(2, 3, 48, 32))
    for handle in handles:
        handle.remove()
    assert rec.grid == (6, 4)
    value = values[0].unflatten(-1, (2, 16)).transpose(1, 2)
    expected = (rec.attention @ value).transpose(1, 2).flatten(2)
    assert relative_error(outputs[0], expected) < 1e-5
    assert rec.of_token(0).shape == (2, 2, 6, 4)
    assert torch.equal(rec.of_token(0).flatten(2), rec.attention[:, :, 0, extra:])
    assert torch.equal(rec.of_patch(2, 3).flatten(2), rec.attention[:, :, extra + 11, extra:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_errors():
    vit = MRLAVisionTransformer(ARCH, 32, 8)
    with record_token_attention(vit) as rec:
        pass
    with pytest.raises(ValueError, match="no forward ran inside"):
        rec.of_token(0)
    for build, layer, error, message in (
        (lambda: MRLAPyramidVisionTransformerV2("b0"), -1, TypeError, "is no vision transformer"),
        (lambda: MRLAVisionTransformer(ARCH, 32, 8, with_cls_token=False, out_type="featmap"), -1,
         ValueError, "no class token"),
        (lambda: vit, 3, ValueError, "no block 3: MRLAVisionTransformer has 3, so -3 to 2"),
    ):  # fmt: skip
        with pytest.raises(error, match=message), record_token_attention(build(), layer):
            pass

"""Tables of costs: names, pages, what is up to date."""

from __future__ import annotations

import re

import pytest
from mmengine.config import Config, ConfigDict

from mmrla.analysis.naming import backbone_name, image_size
from mmrla.commands import cost_counts as cost
from mmrla.commands import cost_tables as tables
from mmrla.engine.network import build_network, plain_model, without_layer_attention
from mmrla.models import MRLAResNet
from tests.conftest import ROOT
from tests.tools.test_tools import run

CIFAR = ROOT / "configs" / "cifar"


def test_table_of_two_configs():
    """The plain config is the other one's host, so there are two rows."""
    names = ("resnet20_mrla_cifar10.py", "resnet20_plain_cifar10.py")
    rows = cost.measure_all(CIFAR / name for name in names)
    titles, line, plain, light, _, skipped = tables.markdown(rows).splitlines()
    assert len({text.count("|") for text in (titles, line, plain, light)}) == 1
    assert plain.startswith("| ResNet-20 | 0.272 M |  | 0.0412 |  |  | 1.5 MiB |  | [")
    assert light.startswith("| ResNet-20 + MRLA-light | 0.277 M | +0.004 | 0.0423 | +0.0010 |")
    assert light.endswith("[resnet20_mrla_cifar10.py](configs/cifar/resnet20_mrla_cifar10.py) |")
    assert "`sigmoid`" in skipped


def test_table_of_other_networks(tmp_path):
    """One that mmrla has no host for, at its own crop; one without a plain config, and the paper.

    The host is counted too then.
    """
    (tmp_path / "a.py").write_text(
        "default_scope = 'mmpretrain'\n"
        "backbone = dict(type='MobileNetV2', widen_factor=0.5)\n"
        "model = dict(type='ImageClassifier', backbone=backbone)\n"
        "crop = dict(type='CenterCrop', crop_size=64)\n"
        "test_dataloader = dict(dataset=dict(type='ImageNet', pipeline=[crop]))\n"
    )
    (tmp_path / "b.py").write_text(
        "default_scope = 'mmpretrain'\n"
        "backbone = dict(type='mmrla.MRLAVisionTransformer', arch='deit-tiny', patch_size=16)\n"
        "model = dict(type='ImageClassifier', backbone=backbone)\n"
    )
    assert image_size(Config.fromfile(tmp_path / "a.py")) == (64, 64)
    rows = cost.measure_all(sorted(tmp_path.glob("*.py")), (64, 64))
    *_, plain, light, other, _, _ = tables.markdown(rows).splitlines()
    assert other.startswith("| MobileNetV2 |")
    assert plain.startswith("| DeiT-T |")
    assert plain.endswith(" |  |")
    assert re.match(r"\| DeiT-T \+ MRLA-light \| 5.557 M \| \+0.032 \| \+0.03 \|", light)


def test_table_of_ablations():
    """Beside the plain network and, where it is counted too, what they are compared with."""
    configs = ROOT / "configs"
    names = ("ablation/deit-tiny_mrla_no-previous", "ablation/deit-tiny_mrla_dk-all")
    paths = [configs / f"{name}_in1k.py" for name in (*names, "imagenet/deit-tiny_mrla")]
    rows = cost.measure_all(paths, (32, 32))
    found = tables.tables(rows)
    assert {group: len(own) for group, own in found.items()} == {"imagenet": 2, "ablation": 4}
    assert " 5.750 M | +0.032 | +0.03 |" in tables.markdown(found["imagenet"])
    titles, line, *table, _, _ = tables.markdown(found["ablation"]).splitlines()
    assert len({text.count("|") for text in (titles, line, *table)}) == 1
    assert [row.split(" | ")[:2] for row in table] == [
        ["| ", "DeiT-T"],
        ["| ", "DeiT-T + MRLA-light, d_k = 16"],
        ["| Like Table 4 (f)", "DeiT-T + MRLA-light, d_k = C"],
        ["| Like Table 4 (b)", "DeiT-T + MRLA-light, d_k = 16, previous: none"],
    ]
    assert [row.split(" | ")[3] for row in table] == ["", "+0.032", "+0.032", "+0.025"]


def rows_of(group: str) -> list[list[str]]:
    """The cells of a table of docs/configs.md, titles first, without rows of no config."""
    text = (ROOT / "docs/configs.md").read_text()
    table = text.split(f"<!-- {group}:begin -->\n")[1].split(f"<!-- {group}:end -->")[0]
    titles, *lines = table.splitlines()
    rows = [titles, *(line for line in lines if "](../configs/" in line)]
    return [row.split(" | ") for row in rows]


def test_no_two_ablations_have_one_name():
    _, *rows = rows_of("ablation")
    listed = {re.search(r"configs/(.*)\)", row[-1])[1] for row in rows}
    there = {f"ablation/{path.name}" for path in (ROOT / "configs" / "ablation").glob("*.py")}
    assert there <= listed
    assert len({row[1] for row in rows}) == len(rows)


def test_names():
    name = backbone_name
    assert name(dict(type="mmrla.MRLAResNeXt", depth=50)) == "ResNeXt-50 (32x4d)"
    cifar = dict(type="mmrla.MRLAResNetCIFAR", depth=20)
    assert name(cifar) == name(dict(cifar, block="basic")) == "ResNet-20"
    assert name(dict(cifar, block="bottleneck")) == "ResNet-20 (bottleneck)"
    assert name(dict(type="mmrla.MRLAPyramidVisionTransformerV2", arch="b1")) == "PVTv2-B1"
    assert name(dict(type="mmrla.MRLACeiT", arch="small")) == "CeiT-S"
    assert name(dict(type="mmrla.MRLAVisionTransformer", arch="base")) == "ViT-B"
    distilled = dict(type="mmpretrain.DistilledVisionTransformer", arch="deit-small")
    assert name(distilled) == "DeiT-S distilled"
    assert name(dict(type="Unheard", arch=dict(num_layers=2, embed_dims=8))) == "Unheard-2x8"


def test_write_replaces_a_table_and_nothing_else(tmp_path):
    page = tmp_path / "configs.md"
    text = (ROOT / "docs/configs.md").read_text()
    page.write_text(text)
    for group in tables.GROUPS:
        tables.write(group, f"the {group} table of [x](configs/x.py)", page)
        written = f"begin -->\nthe {group} table of [x](../configs/x.py)\n<!-- {group}:end"
        assert written in page.read_text()
    assert page.read_text().split("<!--")[0] == text.split("<!--")[0]
    assert page.read_text().split("-->")[-1] == text.split("-->")[-1]


def test_write_of_some_configs_leaves_other_rows(tmp_path):
    def table(*rows: str, ops: str) -> str:
        return "\n".join(["| a | config |", "|---|---|", *rows, "", f"Not counted: {ops}."])

    old = table("| 1 | [x](x) |", "| 2 |  |", "| 3 | [y](y) |", ops="`add`, `sum`")
    new = table("| 0 | [w](w) |", "| 9 |  |", "| 5 | [x](x) |", "| 6 | [z](z) |", ops="`mul`")
    (tmp_path / "README.md").write_text(f"a\n<!-- coco:begin -->\n{old}\n<!-- coco:end -->\nb")
    tables.write("coco", new, tmp_path / "README.md", whole=False)
    rows = ("| 0 | [w](w) |", "| 5 | [x](x) |", "| 6 | [z](z) |", "| 2 |  |", "| 3 | [y](y) |")
    expected = table(*rows, ops="`add`, `mul`, `sum`")
    written = (tmp_path / "README.md").read_text()
    assert written == f"a\n<!-- coco:begin -->\n{expected}\n<!-- coco:end -->\nb"


@pytest.mark.parametrize("group", ["imagenet", "cifar", "coco", "ablation"])
def test_page_is_up_to_date(group):
    """Parameters of the first and the last config in its table."""
    titles, *rows = rows_of(group)
    column = titles.index("params")
    for row in (rows[0], rows[-1]):
        cfg = Config.fromfile(ROOT / re.search(r"\(\.\./(configs/.*)\)", row[-1])[1])
        model = cost.build(cfg.model, cfg.default_scope)
        number, unit = row[column].split()
        digits = len(number.split(".")[1])
        params = sum(p.numel() for p in model.parameters())
        assert (f"{params / 1e6:.{digits}f}", unit) == (number, "M")


def test_plain_hosts_beside_layer_interactions():
    """What RLA_g appends is taken off the head; a network that takes no layer attention stays."""
    imagenet = ROOT / "configs" / "imagenet"
    rla = Config.fromfile(imagenet / "resnet50_rla-g_in1k.py").model
    plain = Config.fromfile(imagenet / "resnet50_plain_in1k.py").model
    assert rla.head.in_channels == 2080
    assert without_layer_attention(rla).head.in_channels == 2048
    assert cost.network(rla) == cost.network(plain)
    path = str(imagenet / "resnet50_rla-g_in1k.py")
    built = build_network(path, plain=True, need_head=True).model
    assert sum(p.numel() for p in built.parameters()) == 25_557_032  # the plain ResNet-50's
    detector = Config.fromfile(ROOT / "configs/retinanet_r50_rla-g_1x.py").model
    assert without_layer_attention(detector).backbone.layer_attention is None
    own = ConfigDict(backbone=dict(type=type("MyResNet", (MRLAResNet,), {}), depth=18))
    assert plain_model(own).backbone.layer_attention is None  # a subclass of another project
    dense = Config.fromfile(imagenet / "densenet161_in1k.py").model
    assert without_layer_attention(dense) == dense
    assert backbone_name(dense.backbone) == "DenseNet-161"


@pytest.mark.slow
def test_model_zoo_is_up_to_date(tmp_path):
    page = tmp_path / "zoo.md"
    text = (ROOT / "docs/model_zoo.md").read_text()
    # A count that is wrong, and what must come back without being timed again.
    page.write_text(text.replace("| 0.27 |", "| 0.99 |"))
    assert page.read_text() != text
    run(ROOT / "tools/analysis/model_zoo.py", "--groups", "cifar", "--rounds", "0", "--page", page)
    assert page.read_text() == text

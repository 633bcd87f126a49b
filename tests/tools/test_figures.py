"""mmrla figure and cost on real images: pictures, and numbers against independent computations."""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmrla.analysis import record_layer_attention
from mmrla.cli import load_script
from mmrla.engine.inspection import choose_device
from mmrla.engine.network import build_network
from mmrla.layers import LayerAttention
from mmrla.registry import LAYER_ATTENTIONS
from tests.conftest import ROOT, relative_error
from tests.helpers import cfg_options, refusal
from tests.tools.test_tools import run

IMAGENET = ROOT / "configs/imagenet"
BASE = IMAGENET / "resnet50_mrla-base_in1k.py"
LIGHT = IMAGENET / "resnet50_mrla_in1k.py"
DEIT = IMAGENET / "deit-tiny_mrla_in1k.py"
SMALL = {
    "model.backbone.depth": 18, "model.backbone.stem_channels": 16,
    "model.backbone.base_channels": 16, "model.head.in_channels": 128,
    "model.backbone.layer_attention.type": "MRLABase",
    "model.backbone.layer_attention.head_channels": 16,
}  # fmt: skip
SMALL_LIGHT = {**SMALL, "model.backbone.layer_attention.type": "MRLALight"}


def test_images_reach_the_network_as_in_evaluation(images):
    """Against OpenCV and the config's mean and std by hand."""
    network = build_network(str(BASE), options=SMALL, size=64)
    inputs, shown = network.read(images[0])
    image = cv2.imread(str(images[0]))
    height, width = image.shape[:2]
    scale = 64 / min(height, width)
    image = cv2.resize(image, (int(width * scale + 0.5), int(height * scale + 0.5)))
    top, left = (round((side - 64) / 2) for side in image.shape[:2])
    rgb = image[top : top + 64, left : left + 64, ::-1]
    assert np.abs(shown.astype(int) - rgb).max() <= 1
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    expected = torch.from_numpy(((shown - mean) / std).transpose(2, 0, 1)).float()
    assert relative_error(inputs[0], expected) < 1e-5


def test_images_of_cifar_are_rgb(images):
    network = build_network(str(ROOT / "configs/cifar/resnet20_mrla_cifar10.py"))
    inputs, shown = network.read(images[0])
    assert inputs.shape == (1, 3, 32, 32)
    mean, std = np.array([125.307, 122.961, 113.8575]), np.array([51.5865, 50.847, 51.255])
    expected = torch.from_numpy(((shown - mean) / std).transpose(2, 0, 1)).float()
    assert relative_error(inputs[0], expected) < 1e-5
    blue = cv2.imread(str(images[0]))[..., 0].mean()
    assert abs(shown[..., 2].mean() - blue) < 12


def test_attention_maps_of_base(tool, images):
    """As many heads as there are; the numbers are the softmax of the network's own features."""
    found = tool("maps", BASE, "--images", *images, "--size", 64, "--all-heads",
                 *cfg_options(SMALL))  # fmt: skip
    assert found["png"] == 5
    numbers = found["npz"]
    scores = numbers["layer3/scores"]
    assert scores.shape == (2, 4, 2, 2)
    assert np.isnan(scores[:, :, 0, 1]).all()
    assert np.allclose(np.nansum(scores, -1), 1, atol=1e-5)
    assert "random weights (seed 0)" in str(numbers["title"])
    network = build_network(str(BASE), options=SMALL, size=64)
    maps = []
    blocks = list(network.backbone.layer3)
    handles = [b.mrla.register_forward_pre_hook(lambda m, a: maps.append(a[0])) for b in blocks]
    with torch.no_grad():
        network.backbone(network.read(images[1])[0])
    for handle in handles:
        handle.remove()
    query, *keys = (
        conv(x.mean((2, 3))[:, None])[0, 0].view(4, 16)
        for conv, x in ((blocks[1].mrla.query, maps[1]), (blocks[0].mrla.key, maps[0]),
                        (blocks[1].mrla.key, maps[1]))
    )  # fmt: skip
    logits = torch.stack([(query * key).sum(-1) for key in keys], -1) / math.sqrt(16)
    assert relative_error(torch.from_numpy(scores[1, :, 1]), logits.softmax(-1)) < 1e-4


def test_attention_maps_of_light_in_a_detector(tool, images):
    """A detector with its own test pipeline; the weights are products of gates and lambdas."""
    config = ROOT / "configs/mask_rcnn_r50_mrla_1x.py"
    small = {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512]}
    found = tool("maps", config, "--images", images[0].parent, "--max-images", 2,
                 "--size", 96, "--heads", 0, 1, *cfg_options(small))  # fmt: skip
    numbers = found["npz"]
    assert "shortcut" in str(numbers["scores_are"])
    network = build_network(str(config), options=small)
    mrla = network.backbone.layer2[1].mrla
    scores = numbers["layer2/scores"]
    assert scores.shape == (2, 4, 2, 2)
    scale = mrla.lambda_t.detach().abs().view(4, 32).mean(1).numpy()
    assert np.allclose(scores[:, :, 1, 0], scores[:, :, 0, 0] * scale, rtol=1e-4)


def test_checkpoints(tool, images, tmp_path):
    """A checkpoint is what is drawn; one of the plain network is none of MRLA's."""
    network = build_network(str(BASE), options=SMALL, size=64, seed=3)
    path = tmp_path / "trained.pth"
    torch.save(dict(state_dict=network.model.state_dict()), path)
    args = ["--images", images[0], "--size", 64, *cfg_options(SMALL)]
    found = tool("maps", BASE, path, *args)["npz"]
    assert str(found["title"]).split(", ")[1] == "trained.pth"
    with record_layer_attention(network.model) as rec:
        network.features(network.read(images[0])[0])
    for group in rec.groups:
        expected = group.scores.numpy()
        assert np.allclose(found[f"{group.name}/scores"], expected, equal_nan=True, atol=1e-6)
    seeded = tool("maps", BASE, *args, "--seed", 3)["npz"]
    assert np.array_equal(
        seeded["layer1/scores"], found["layer1/scores"], equal_nan=True
    )  # the same weights again
    plain = build_network(str(BASE), options=SMALL, plain=True)
    torch.save(plain.model.state_dict(), tmp_path / "plain.pth")
    tool("maps", BASE, tmp_path / "plain.pth", *args, fails="would stay random")


def test_query_similarity(tool, images):
    args = [BASE, "--images", *images, "--size", 64, *cfg_options(SMALL)]
    tool("similarity", *args, fails="--include-first takes it too")
    found = tool("similarity", *args, "--include-first", "--bins", 10)
    numbers = found["npz"]
    assert numbers["layer4"].shape == (2, 1, 8)
    network = build_network(str(BASE), options=SMALL, size=64)
    with record_layer_attention(network.model) as rec:
        network.features(network.read(images[1])[0])
    q = rec.groups[3].queries[0].double().numpy()
    cosine = (q[0] * q[1]).sum(-1) / np.sqrt((q[0] ** 2).sum(-1) * (q[1] ** 2).sum(-1))
    assert np.allclose(numbers["layer4"][1, 0], np.abs(cosine), atol=1e-5)
    rows = [row for row in found["csv"] if row["group"] == "layer4"]
    counts = [int(row["pairs"]) for row in rows]
    assert sum(counts) == 2 * 8
    assert counts == np.histogram(numbers["layer4"], 10, (0, 1))[0].tolist()


def test_query_similarity_with_a_deeper_network(tool, images):
    deeper = cfg_options({**SMALL, "model.backbone.depth": 34})
    found = tool("similarity", BASE, "--images", images[0], "--size", 64,
                 *deeper)["npz"]  # fmt: skip
    pairs = {f"layer{i}": found[f"layer{i}"].shape[1] for i in (1, 2, 3, 4)}
    assert pairs == {"layer1": 1, "layer2": 2, "layer3": 4, "layer4": 1}


def by_hand(network, layer, inputs, target):
    """ScoreCAM as its paper says, for one image."""
    maps = []
    handle = layer.register_forward_hook(lambda module, args, out: maps.append(out))
    with torch.no_grad():
        network.model(inputs, mode="tensor")
        handle.remove()
        (features,) = maps[0]
        masks = F.interpolate(
            features[None], inputs.shape[-2:], mode="bilinear", align_corners=True
        )[0]
        low, high = masks.amin((1, 2), True), masks.amax((1, 2), True)
        masks = (masks - low) / (high - low + 1e-8)
        scores = network.model(inputs * masks[:, None], mode="tensor")[:, target]
        cam = (scores.softmax(0)[:, None, None] * features).sum(0).relu().numpy()
    cam = cv2.resize(cam, inputs.shape[-1:-3:-1])
    return (cam - cam.min()) / (cam.max() - cam.min())


def test_score_cam(tool, images):
    pytest.importorskip("pytorch_grad_cam")
    args = ["--images", images[0], "--size", 64, "--target", 7, *cfg_options(SMALL_LIGHT)]
    numbers = tool("cam", LIGHT, *args)["npz"]
    assert numbers["columns"].tolist() == [
        "plain layer3", "plain layer4", "MRLALight layer3", "MRLALight layer4"
    ]  # fmt: skip
    assert numbers["targets"].tolist() == [[7] * 4]
    network = build_network(str(LIGHT), options=SMALL_LIGHT, size=64)
    assert network.dataset_meta["classes"][7] == "cock"  # for the notes, without a checkpoint
    inputs = network.read(images[0])[0]
    for index, layer in ((2, network.backbone.layer3), (3, network.backbone.layer4)):
        expected = by_hand(network, layer, inputs, 7)
        assert np.abs(numbers["maps"][0, index] - expected).max() < 1e-3
    tool("cam", LIGHT, *args, "--layers", "layer5", fails="no layer 'layer5' in MRLAResNet")
    tool("cam", LIGHT, *args, "--target", 1000, fails="--target must be a class, 0 to 999")
    detector = ROOT / "configs/mask_rcnn_r50_mrla_1x.py"
    tool("cam", detector, "--images", images[0], fails="it takes a classifier, got MaskRCNN")


def test_score_cam_of_tokens(tool, images):
    pytest.importorskip("pytorch_grad_cam")
    args = ["--images", images[0], "--size", 64]
    tool("cam", DEIT, *args, fails="name the layers with --layers")
    found = tool("cam", DEIT, *args, "--layers", "layers.10", "--target", 3)["npz"]
    assert found["maps"].shape == (1, 2, 64, 64)
    network = build_network(str(DEIT), size=64)
    inputs = network.read(images[0])[0]
    # As a map of 4 x 4, without the class token.
    block = network.backbone.layers[10]
    as_map = torch.nn.Identity()
    handle = block.register_forward_hook(
        lambda module, inputs, out: [
            as_map(out[:, 1:].transpose(1, 2).unflatten(2, (4, 4))),
            None,
        ][1]
    )
    expected = by_hand(network, as_map, inputs, 3)
    handle.remove()
    assert np.abs(found["maps"][0, 1] - expected).max() < 2e-3
    tool("cam", DEIT, *args, "--layers", "drop_after_pos.0", fails="no layer")
    tool("cam", DEIT, *args, "--layers", "head.layers.head", fails="is not called")
    tool("cam", DEIT, *args, "--max-images", 0, "--layers", "ln1",
         fails="--max-images must be at least 1")  # fmt: skip


def test_class_attention(tool, images):
    args = ["--images", *images, "--layer", 4, "--size", 96]
    numbers = tool("class-token", DEIT, *args)["npz"]
    network = build_network(str(DEIT), size=96)
    seen = []
    block = network.backbone.layers[4].attn
    handle = block.qkv.register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    network.features(network.read(images[1])[0])
    handle.remove()
    tokens = len(seen[0])
    assert tokens == 1 + 6 * 6
    for head in range(3):
        query, key = (seen[0][:, part * 192 + 64 * head :][:, :64].detach() for part in (0, 1))
        expected = torch.softmax(query[0] @ key.t() / 8, -1)[1:].view(6, 6)
        found = torch.from_numpy(numbers["MRLALight/1"][head])
        assert relative_error(found, expected) < 1e-4
        assert found.sum() < 1  # the rest is the class token's own
    # The plain host has the same random weights, so that MRLA alone makes the difference.
    assert numbers["plain/1"].shape == (3, 6, 6)
    assert not np.allclose(numbers["plain/1"], numbers["MRLALight/1"])
    first = tool("class-token", DEIT, *args[:-4], "--layer", 0, "--size", 96)["npz"]
    assert np.allclose(first["plain/1"], first["MRLALight/1"], atol=1e-6)
    others = ["--beside", DEIT] * 3  # of one class and name
    numbers = tool("class-token", DEIT, "--images", images[0], "--size", 64, *others)["npz"]
    label = f"MRLALight ({DEIT.stem}"
    labels = ["plain", "MRLALight", f"{label})", f"{label}, 2)", f"{label}, 3)"]
    assert [key[:-2] for key in numbers if key.endswith("/0")] == labels
    patch = tool("class-token", DEIT, *args, "--query", 5, 2, "--heads", 1)["npz"]
    query, key = (seen[0][:, part * 192 + 64 :][:, :64].detach() for part in (0, 1))
    expected = torch.softmax(query[1 + 5 * 6 + 2] @ key.t() / 8, -1)[1:].view(6, 6)
    assert relative_error(torch.from_numpy(patch["MRLALight/1"][1]), expected) < 1e-4
    tool("class-token", DEIT, *args, "--query", 6, 0, fails="no patch at row 6, column 0")
    tool("class-token", DEIT, *args, "--layer", 12, fails="no block 12")
    tool("class-token", DEIT, *args, "--heads", 3, fails="no head 3 in plain, which has 3: 0 to 2")
    tool("class-token", LIGHT, "--images", images[0], *cfg_options(SMALL_LIGHT),
         fails="MRLAResNet is no vision transformer")  # fmt: skip


def test_class_attention_in_a_detector(tool, images):
    """Images of any shape, padded: the map is cut back to the image."""
    config = ROOT / "configs/mask_rcnn_vit-t_mrla_sfp_1x.py"
    found = tool("class-token", config, "--images", *images, "--size", 80)["npz"]
    network = build_network(str(config), size=80)
    inputs = network.read(images[0])[0]
    assert found["MRLALight/0"].shape == (3, inputs.shape[2] // 16, inputs.shape[3] // 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((BASE, "--images", "nowhere/*.jpg"), "--images: nothing matches"),
        ((BASE, "--images", __file__), "not an image that OpenCV can read"),
        ((BASE, "--images", ROOT / "requirements"), "--images: no image (.jpg"),
        ((BASE, "missing.pth", "--images", "IMAGE"), "no such checkpoint"),
        ((BASE, "--images", "IMAGE", "--size", 64, "--heads", 5, *cfg_options(SMALL)),
         "no head 5 in layer1, which has 1: 0 to 0"),
        ((IMAGENET / "resnet51.py", "--images", "IMAGE"), "did you mean"),
        ((ROOT / "configs/cifar/resnet20_plain_cifar10.py", "--images", "IMAGE"),
         "ImageClassifier has no layer attention"),
        ((LIGHT, "--images", "IMAGE", "--size", 0), "--size must be at least 1"),
    ],
)  # fmt: skip
def test_errors(tool, images, args, message):
    tool("maps", *(images[0] if a == "IMAGE" else a for a in args), fails=message)


def test_devices(capsys):
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"--device {name}: no such device"):
            choose_device(name)
    assert "--device" in refusal(capsys, "export-onnx", LIGHT, "--device", "cpu")  # has none


def test_a_layer_attention_that_does_not_tell(tool, images, monkeypatch):
    class Silent(LayerAttention):
        def __init__(self, channels, head_channels):
            super().__init__(channels)

        def forward(self, x, shortcut, state):
            return x, None

    monkeypatch.setitem(LAYER_ATTENTIONS._module_dict, "Silent", Silent)
    silent = cfg_options({**SMALL, "model.backbone.layer_attention.type": "Silent"})
    tool("maps", BASE, "--images", images[0], "--size", 64, *silent,
         fails="Silent (backbone.layer1.0.mrla) does not tell what it attends to")  # fmt: skip


def test_as_a_command(images, tmp_path):
    """From an empty folder, with a progress bar, the files named at the end."""
    done = run(ROOT / "tools/analysis/attention_maps.py", LIGHT, "--images", *images, "--size", 64,
               *cfg_options(SMALL_LIGHT), cwd=tmp_path)  # fmt: skip
    assert "2/2" in done.stderr
    assert "Traceback" not in done.stderr
    for line in done.stdout.splitlines()[-2:]:
        assert (tmp_path / line).is_file()


TEXT = (ROOT / "docs/analysis.md").read_text().replace("\\\n", " ")  # commands on several lines


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`mmrla (\w+ [\w-]+)`", TEXT))))
def test_what_the_docs_show_is_there(name, capsys):
    """Every command has an example, with options that it has and configs that are there."""
    (line,) = re.findall(rf"^mmrla {name} .*$", TEXT, re.M)
    command, subcommand = name.split()
    module = importlib.import_module(f"mmrla.commands.{command}")
    args = module.parse_args(shlex.split(line)[2:])
    assert (ROOT / args.config).is_file()
    with pytest.raises(SystemExit):
        module.parse_args([subcommand, "--help"])
    listed = set(re.findall(r"(--[a-z-]+)", capsys.readouterr().out))
    section = TEXT[TEXT.index(line) :].split("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)", section)) <= listed


def test_what_the_overview_writes_is_up_to_date(tmp_path):
    overview = load_script("analysis/overview.py")
    assert len(overview.facts()) == 3
    for label, value in overview.facts().items():
        assert (ROOT / f"docs/images/{label}.svg").read_text() == overview.badge(label, value)
    page = ROOT / "docs/layer_attentions.md"
    (tmp_path / "page.md").write_text(
        re.sub(r"[+-][\d.]+( ± [\d.]+)? \(\d\) \|", "|", page.read_text())
    )
    record = json.loads((ROOT / "docs/results.json").read_text())
    overview.write_gains(tmp_path / "page.md", record)
    assert (tmp_path / "page.md").read_text() == page.read_text()

"""Files of others run no code, and nothing is read or written outside its folder."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from mmrla import config_path
from mmrla.checkpoints import load_file
from mmrla.checkpoints.files import CheckpointError, safe_loading
from mmrla.checkpoints.plan import keeps_mrla_trainable
from mmrla.cli import main
from mmrla.engine.data.config import check_data
from mmrla.engine.network import build_network
from mmrla.engine.run.runner import check_weights
from mmrla.models import LayerAttentionWrapper, MRLAPyramidVisionTransformerV2, MRLAResNet
from tests.conftest import ROOT
from tests.helpers import files_in, refusal

STATE = {"conv1.weight": torch.zeros(8, 3, 7, 7)}
CONFIG = str(ROOT / "configs/retinanet_r50_mrla_1x.py")
NARROW = dict(stem_channels=8, base_channels=8, layer_attention=None)


class Reduced:
    """Pickles as a call, with a state for its result."""

    def __init__(self, *parts) -> None:
        self.parts = parts

    def __reduce__(self):
        return self.parts


def touching(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """What a file's code would leave."""
    monkeypatch.delenv("MMRLA_UNSAFE_LOAD", raising=False)
    return tmp_path / "code-ran"


@pytest.fixture(params=["zip", "legacy"])
def evil(request, marker) -> str:
    """A checkpoint that runs code where it is unpickled."""
    path = marker.parent / "evil.pth"
    content = {"state_dict": STATE, "x": Reduced(exec, (touching(marker),))}
    torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
    return str(path)


def pretrained(path: str) -> dict:
    return dict(type="Pretrained", checkpoint=path)


def warm(path: str) -> dict:
    return dict(type="mmrla.WarmStart", checkpoint=path)


def wrapped(path: str) -> None:
    backbone = dict(type="mmdet.ResNet", depth=18, base_channels=8, init_cfg=pretrained(path))
    layer_attention = dict(type="MRLALight", head_channels=8)
    LayerAttentionWrapper(backbone, layer_attention, probe_size=32).init_weights()


def loaded_by_mmengine(path: str) -> None:
    with safe_loading():
        CheckpointLoader.load_checkpoint(path, map_location="cpu")


READERS = {
    "load_file": load_file,
    "mmengine": loaded_by_mmengine,
    "warm start": lambda path: MRLAResNet(18, init_cfg=warm(path), **NARROW).init_weights(),
    "look at keys": lambda path: keeps_mrla_trainable(warm(path)),
    "Pretrained": lambda path: MRLAResNet(18, init_cfg=pretrained(path), **NARROW).init_weights(),
    "Pretrained PVT": lambda path: MRLAPyramidVisionTransformerV2(
        "b0", layer_attention=None, init_cfg=pretrained(path)
    ).init_weights(),
    "wrapper": wrapped,
    "analysis": lambda path: build_network(
        str(ROOT / "configs/cifar/resnet20_mrla_cifar10.py"), path
    ),
    "load_from": lambda path: check_weights(Config(dict(load_from=path))),
    "resume": lambda path: check_weights(Config(dict(load_from=path, resume=True))),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_code(reader, evil, marker):
    with pytest.raises(CheckpointError, match="holds objects besides tensors.*MMRLA_UNSAFE_LOAD"):
        READERS[reader](evil)
    assert not marker.exists()


def test_the_file_is_what_it_claims_to_be(evil, marker):
    """Else the tests above could not fail."""
    torch.load(evil, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "EVIL", "OUT"],
        ["publish", "EVIL", "OUT"],
        ["test", CONFIG, "EVIL", "--data-root", "DATA", "--work-dir", "OUT"],
        ["train", CONFIG, "--resume", "EVIL", "--data-root", "DATA", "--work-dir", "OUT"],
        ["train", CONFIG, "--data-root", "DATA", "--work-dir", "OUT", "--cfg-options",
         "load_from=EVIL"],
    ],
    ids=["convert", "publish", "test", "resume", "load_from"],
)  # fmt: skip
def test_no_command_runs_code(words, evil, marker, coco_mini, tmp_path, capsys):
    names = {"EVIL": evil, "OUT": str(tmp_path / "out"), "DATA": str(coco_mini)}
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    assert "holds objects besides tensors" in refusal(capsys, *words)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def through_getattr(marker: Path) -> dict:
    """Made of names alone that a training checkpoint holds, and yet it reaches ``exec``."""
    builtins = Reduced(getattr, (getattr, "__self__"))
    execute = Reduced(getattr, (builtins, "exec"))
    attributes = {"__setstate__": execute, "one": Counter()}
    patch = Reduced(getattr, (Counter(), "__class__"), (None, attributes))
    call = Reduced(getattr, (Counter, "one"), touching(marker))
    return {"state_dict": STATE, "message_hub": [patch, call]}


def test_names_of_log_histories_are_no_way_around(marker):
    path = str(marker.parent / "chain.pth")
    torch.save(through_getattr(marker), path)
    assert list(load_file(path)["state_dict"]) == list(STATE)
    loaded_by_mmengine(path)
    assert not marker.exists()
    try:
        torch.load(path, weights_only=False)
    finally:
        for name in ("__setstate__", "one"):
            delattr(Counter, name)
    assert marker.exists()  # so what passes here is not to be given to plain pickle


def test_log_histories_come_back(marker):
    """A resumed run goes on with the averages of its log."""
    history = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 2], max_length=7)
    path = marker.parent / "epoch_1.pth"
    torch.save({"state_dict": STATE, "message_hub": {"log_scalars": {"loss": history}}}, path)
    with safe_loading():
        checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location="cpu")
    found = checkpoint["message_hub"]["log_scalars"]["loss"]
    assert type(found) is HistoryBuffer
    assert found.max_length == 7
    assert found.mean() == history.mean()
    assert found.statistics("current") == 6.0
    found.update(3.0)
    assert pickle.loads(pickle.dumps(found)).current() == 3.0


def test_mmengine_is_left_as_it_was():
    before = dict(CheckpointLoader._schemes)
    with pytest.raises(CheckpointError, match="open-mmlab://x: cannot be read"), safe_loading():
        CheckpointLoader.load_checkpoint("open-mmlab://x")
    assert CheckpointLoader._schemes == before


def test_cifar_files_that_are_not_the_official_ones_are_not_unpickled(marker):
    from mmrla.datasets import FolderCIFAR10

    folder = marker.parent / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Reduced(exec, (touching(marker),))))
    with pytest.raises(RuntimeError, match="Cannot find"):
        FolderCIFAR10(data_root=str(marker.parent), split="train")
    assert not marker.exists()


# --- paths ---


def test_the_converter_writes_one_file(tmp_path, capsys):
    from torchvision.models import resnet18

    source, other = tmp_path / "in/plain.pth", tmp_path / "other.txt"
    source.parent.mkdir()
    torch.save(resnet18().state_dict(), source)
    other.write_text("untouched")
    target = tmp_path / "out/converted.pth"
    target.parent.mkdir()
    target.symlink_to(other)
    before = files_in(tmp_path)
    main(["convert", str(source), str(target)])
    after = files_in(tmp_path)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"out/converted.pth"}
    assert not target.is_symlink()
    assert load_file(target)["state_dict"]
    bad = tmp_path / "in/bad.pth"
    bad.write_bytes(b"no checkpoint")
    refusal(capsys, "convert", bad, tmp_path / "out/bad.pth")
    assert files_in(tmp_path).keys() == {*before, "in/bad.pth"}


@pytest.mark.parametrize("name", ["../../cli", "mmrla::../../cli.py", "imagenet/../../../cli",
                                  "..\\..\\cli", str(ROOT / "mmrla/cli")])  # fmt: skip
def test_names_of_configs_stay_in_their_folder(name):
    with pytest.raises(ValueError, match="leads out of mmrla's configs") as caught:
        config_path(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        (dict(ann_file="../secret.json"), "ann_file='../secret.json'"),
        (dict(data_prefix=dict(img="images/../../x")), "data_prefix.img='images/../../x'"),
    ],
    ids=["ann_file", "data_prefix"],
)
def test_paths_of_a_dataset_stay_in_its_root(changes, place, tmp_path):
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "a.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "x").mkdir()
    dataset = dict(data_root=str(root), ann_file="a.json", data_prefix=dict(img="images/"))
    good = Config(dict(train_dataloader=dict(dataset=dataset)))
    check_data(good, ["train"])
    bad = Config(dict(train_dataloader=dict(dataset={**dataset, **changes})))
    with pytest.raises(ValueError, match="leads out of data_root") as caught:
        check_data(bad, ["train"])
    assert f"train_dataloader.dataset.{place}" in str(caught.value)


def test_report_replaces_a_link(tmp_path):
    from mmrla.engine.data.sets import write_json

    other, out = tmp_path / "other.txt", tmp_path / "report.json"
    other.write_text("untouched")
    out.symlink_to(other)
    write_json([], out, {})
    assert other.read_text() == "untouched"
    assert out.read_text().startswith("{")

"""Every classification config trains, evaluates and is reused, on a folder laid out as ImageNet."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.datasets import CIFAR10

import mmrla.registry  # noqa: F401
from mmrla.cli import load_script
from mmrla.engine import check_data, set_data_root
from mmrla.engine.cifar import Trainer, crop_and_flip, load_split, table
from mmrla.engine.report import newest, read_scalars
from tests.conftest import ROOT
from tests.datasets.bad_sets import write_image
from tests.tools.test_tools import losses, one_error, run

IMAGENET = sorted((ROOT / "configs/imagenet").glob("*.py"))
SMALL = ("resnet50_mrla_in1k", "efficientnet-b0_mrla_in1k", "deit-tiny_mrla_in1k",
         "ceit-tiny_mrla-base_in1k", "pvtv2-b0_mrla-base_in1k")  # fmt: skip


def narrow(attention: bool) -> dict[str, int]:
    """A CIFAR network with half of the channels learns colours as well, and sooner."""
    options = {"stem_channels": 8, "base_channels": 8}
    if attention:
        options["layer_attention.head_channels"] = 8
    return {f"model.backbone.{k}": v for k, v in options.items()} | {"model.head.in_channels": 32}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Real ImageNet has 1000 class folders, so this has too; four of them hold images."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in range(1000):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for index in range(count if label < 4 else 0):
                image = rng.integers(0, 64, (70, 90, 3)) + 48 * label
                cv2.imwrite(str(folder / f"{index}.JPEG"), image.astype(np.uint8))
    return root


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in SMALL else pytest.mark.slow)
        for path in IMAGENET
    ],
)
def test_trains_an_epoch_and_evaluates(path, imagenet, tmp_path):
    """The recipe as it is, at 16 training and 8 validation images."""
    cfg = Config.fromfile(path)
    set_data_root(cfg, imagenet)
    check_data(cfg)
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = path.stem
    cfg.train_cfg.max_epochs = 1
    for scheduler in cfg.param_scheduler:
        scheduler.begin, scheduler.end = 0, 1
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.batch_size, loader.num_workers, loader.persistent_workers = 4, 0, False
    runner = Runner.from_cfg(cfg)
    runner.train()
    lines = read_scalars(newest(tmp_path, "*/vis_data/scalars.json"))
    assert {"accuracy/top1", "accuracy/top5"} <= lines[-1].keys()
    assert runner.iter == 4
    # Every parameter had a gradient, so the optimizer remembers something of it.
    remembered = runner.optim_wrapper.optimizer.state
    assert all(remembered[parameter] for parameter in runner.model.parameters())
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_the_commands(imagenet, tmp_path):
    """train.py and test.py on a classifier, from an empty folder; predictions and pictures."""
    config = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    tiny = ["train_cfg.max_epochs=1", "train_dataloader.batch_size=4", "model.backbone.depth=18",
            "model.head.in_channels=512", "default_hooks.logger.interval=1"]  # fmt: skip
    args = ["--data-root", imagenet, "--cfg-options", *tiny]
    done = run(ROOT / "tools/train.py", config, *args, cwd=tmp_path)
    log = done.stdout + done.stderr
    assert len(losses(log)) == 4
    assert "accuracy/top1" in log
    checkpoint = tmp_path / "work_dirs/resnet50_mrla_in1k/epoch_1.pth"
    done = run(
        ROOT / "tools/test.py", config, checkpoint, "--out", "out.pkl", "--show-dir", "shown",
        "--amp", *args, cwd=tmp_path,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert "accuracy/top5" in log
    assert "layout: channels_last" in log
    with (tmp_path / "out.pkl").open("rb") as file:
        predictions = pickle.load(file)
    assert len(predictions) == 8
    assert predictions[0]["pred_score"].shape == (1000,)
    pictures = list((tmp_path / "work_dirs/resnet50_mrla_in1k/shown").glob("*.png"))
    assert pictures
    assert cv2.imread(str(pictures[0])) is not None


@pytest.mark.slow
def test_classes_of_ones_own(tmp_path):
    """What README says, with a recipe that mixes images, on three folders whose names repeat."""
    for split in ("train", "val"):
        for name in ("ant", "bee", "cat"):
            for index in range(2):
                write_image(tmp_path / "data" / split / name / f"{index}.jpg")
    config = ROOT / "configs/imagenet/deit-tiny_mrla_in1k.py"
    options = [
        "--data-root", tmp_path / "data", "--cfg-options", "model.head.num_classes=3",
        *(f"{split}_dataloader.dataset.metainfo.classes=[ant,bee,cat]"
          for split in ("train", "val", "test")),
        "train_cfg.max_epochs=1",
    ]  # fmt: skip
    done = run(ROOT / "tools/train.py", config, *options, cwd=tmp_path, ok=False)
    error = one_error(done)
    assert "param_scheduler[1] (CosineAnnealingLR) begins at epoch 5" in error
    options += ["param_scheduler.0.end=1", "param_scheduler.1.begin=0"]
    done = run(ROOT / "tools/train.py", config, *options, cwd=tmp_path)
    log = done.stdout + done.stderr
    assert "accuracy/top1" in log
    assert "accuracy/top5" not in log
    checkpoint = tmp_path / "work_dirs/deit-tiny_mrla_in1k/epoch_1.pth"
    run(ROOT / "tools/test.py", config, checkpoint, "--show-dir", "shown", *options, cwd=tmp_path)
    shown = {p.name for p in (tmp_path / "work_dirs/deit-tiny_mrla_in1k/shown").iterdir()}
    assert len(shown) == 6
    assert any(name.startswith("bee_1") for name in shown)
    wrong = [*options, "model.head.num_classes=3", "train_dataloader.dataset.metainfo.classes=[a]"]
    done = run(ROOT / "tools/train.py", config, *wrong, "--dry-run", cwd=tmp_path, ok=False)
    assert "3" in one_error(done)


def test_folders_that_are_not_there(tmp_path):
    (tmp_path / "train").mkdir()
    config = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    done = run(ROOT / "tools/train.py", config, "--data-root", tmp_path, cwd=tmp_path, ok=False)
    error = one_error(done)
    assert "val_dataloader.dataset.split='val': no such folder" in error
    assert str(tmp_path / "val") in error


@pytest.fixture(scope="module", params=["folders", "official"])
def cifar(request, tmp_path_factory):
    """512 training and 64 test images whose mean colour tells the class; both layouts."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    base = 40 + 40 * np.stack(np.unravel_index(np.arange(10), (3, 2, 2)), 1)
    for split, count in (("train", 512), ("test", 64)):
        labels = np.arange(count) % 10
        images = base[labels][:, None, None] + rng.integers(-30, 30, (count, 32, 32, 3))
        images = images.clip(0, 255).astype(np.uint8)
        if request.param == "folders":
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                folder = root / split / CIFAR10.METAINFO["classes"][label]
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"{index:04d}.png"), image[..., ::-1])
        else:
            files = CIFAR10.train_list if split == "train" else CIFAR10.test_list
            (root / CIFAR10.base_folder).mkdir(exist_ok=True)
            parts = np.array_split(np.arange(count), len(files))
            for (name, _), part in zip(files, parts, strict=True):
                x, y = images[part], labels[part]
                data = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
                with (root / CIFAR10.base_folder / name).open("wb") as file:
                    pickle.dump(dict(data=data, labels=y.tolist()), file)
    with pytest.MonkeyPatch.context() as patch:
        # The generated official files have other checksums than the real ones.
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        yield root, request.param, base


def cifar_config(kind: str, root, depth: int = 20) -> Config:
    cfg = Config.fromfile(ROOT / f"configs/cifar/resnet{depth}_{kind}_cifar10.py")
    set_data_root(cfg, root)
    cfg.train_dataloader.batch_size = 64
    return cfg


def test_cifar_is_read_in_rgb(cifar):
    root, _, base = cifar
    data = load_split(cifar_config("plain", root).test_dataloader.dataset, torch.device("cpu"))
    assert data.images.shape == (64, 3, 32, 32)
    means = data.images.float().mean((2, 3)).numpy()
    assert np.abs(means - base[data.labels.numpy()]).max() < 5


@pytest.mark.parametrize("kind", ["plain", "mrla", "mrla-base"])
def test_cifar_trainer_learns_and_repeats(kind, cifar, tmp_path):
    """Colours are learned in three epochs; the same seed gives the same weights."""
    from mmrla.engine.cifar import run as run_cifar

    root, layout, _ = cifar
    if layout == "official" and kind != "plain":
        pytest.skip("one network is enough for the other layout")
    cfg = cifar_config(kind, root)
    cfg.merge_from_dict(narrow(kind != "plain"))
    device = torch.device("cpu")
    for log in ("a", "b"):
        run_cifar(cfg, tmp_path / log / "x.jsonl", 3, device, epochs=3)
    a, b = ((tmp_path / log / "x.jsonl").read_text().splitlines() for log in ("a", "b"))
    lines = [json.loads(line) for line in a]
    assert lines[0]["config"] == f"resnet20_{kind}_cifar10"
    assert [line["lr"] for line in lines[1:]] == pytest.approx([0.1, 0.1, 0.01])
    assert lines[-1]["loss"] < lines[1]["loss"]
    again = [json.loads(line) for line in b]
    assert [x["loss"] for x in lines[1:]] == [x["loss"] for x in again[1:]]
    assert [x["top1"] for x in lines[1:]] == [x["top1"] for x in again[1:]]
    assert f"{lines[-1]['top1']:.2f}" in table(tmp_path / "a")
    log = tmp_path / "a/x.jsonl"
    whole = log.read_text()
    log.write_text(whole[:-9])  # cut off while it was written: unfinished, so done again
    assert "resnet20" not in table(tmp_path / "a")
    run_cifar(cfg, log, 3, device, epochs=3)
    assert [json.loads(line)["top1"] for line in log.read_text().splitlines()[1:]] == [
        line["top1"] for line in lines[1:]
    ]
    (tmp_path / "b/y.jsonl").write_text("{\n{}\n")
    with pytest.raises(ValueError, match="y.jsonl: line 1 is not JSON"):
        table(tmp_path / "b")
    with pytest.raises(ValueError, match="has other settings"):
        run_cifar(cfg, tmp_path / "a/x.jsonl", 4, device, epochs=3)
    settings, rest = log.read_text().split("\n", 1)
    settings = json.loads(settings)
    del settings["config_and_data"]  # which earlier versions did not write
    (tmp_path / "b/old.jsonl").write_text(f"{json.dumps(settings)}\n{rest}")
    for key, value in (
        ("model.backbone.stem_channels", 9),
        ("optim_wrapper.optimizer.lr", 0.2),
        ("train_dataloader.dataset.data_root", str(tmp_path)),
    ):
        other = copy.deepcopy(cfg)
        other.merge_from_dict({key: value})
        run_cifar(other, tmp_path / "b/old.jsonl", 3, device, epochs=3)  # is finished
        with pytest.raises(ValueError, match="has other settings"):
            run_cifar(other, log, 3, device, epochs=3)


def test_results_are_trained_once_and_written(cifar, tmp_path, monkeypatch):
    root, layout, _ = cifar
    if layout == "official":
        pytest.skip("the other layout is enough")
    results = load_script("results.py")
    rows = tuple(
        row._replace(options=narrow(row.name != "plain"))
        for row in results.EXPERIMENTS["cifar"].rows
        if row.name in ("plain", "light")
    )
    short = results.EXPERIMENTS["cifar"]._replace(rows=rows, epochs=3)
    monkeypatch.setattr(results, "EXPERIMENTS", {"cifar": short})
    monkeypatch.setattr(results, "IMAGES", 256)
    for name in ("PAGE", "RECORD", "PICTURE"):
        path = tmp_path / "docs" / getattr(results, name).name
        monkeypatch.setattr(results, name, path)
    results.PAGE.parent.mkdir()
    results.PAGE.write_text("before\n\n<!-- results:begin -->\n<!-- results:end -->\n\nafter\n")

    def go(*options: str) -> str:
        where = ["--cifar10", str(root), "--work-dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["results.py", *where, *options])
        results.main()
        return results.PAGE.read_text()

    page = go("--seeds", "0", "--rows", "plain")
    assert "| light | not run: about 0.1 h per seed |" in page
    page = go("--seeds", "0", "1", "--only", "cifar")
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    logs = {
        name: [tmp_path / f"runs/cifar/{name}_seed{seed}/log.jsonl" for seed in (0, 1)]
        for name in ("plain", "light")
    }
    last = {
        name: [json.loads(log.read_text().splitlines()[-1])["top1"] for log in found]
        for name, found in logs.items()
    }
    gains = np.subtract(last["light"], last["plain"])
    (row,) = [line for line in page.splitlines() if line.startswith("| light |")]
    assert f"| {np.mean(last['light']):.1f} ± {np.std(last['light'], ddof=1):.1f} |" in row
    assert f"| {gains.mean():+.1f} ± {gains.std(ddof=1):.1f} |" in row
    assert hashlib.sha256(logs["light"][1].read_bytes()).hexdigest()[:12] in row
    assert cv2.imread(str(results.PICTURE)) is not None
    # Elsewhere the record tells what has run: nothing is trained again.
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(results, "run", None)
    assert go("--seeds", "0", "1") == page


def test_all_networks_of_a_seed_see_the_same_batches(cifar):
    root, _, _ = cifar
    device = torch.device("cpu")
    seen = []
    for kind in ("plain", "mrla"):
        trainer = Trainer(cifar_config(kind, root), 5, device, epochs=2)
        data = load_split(trainer.cfg.train_dataloader.dataset, device)
        torch.rand(7)  # what a network draws does not matter
        seen.append([images for images, _ in trainer._batches(data, 1, 64)])
    assert len(seen[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_cifar_layouts_compute_the_same(cifar):
    cfg = cifar_config("mrla", cifar[0])
    data = load_split(cfg.train_dataloader.dataset, torch.device("cpu"))
    found = []
    for channels_last in (True, False):
        trainer = Trainer(cfg, 0, torch.device("cpu"), channels_last=channels_last)
        loss = trainer._loss(data.images[:32], data.labels[:32])
        loss.backward()
        weights = [p for p in trainer.model.parameters() if p.dim() == 4 and p.shape[1] > 3]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert all(p.is_contiguous(memory_format=layout) for p in weights)
        found.append([loss, *(p.grad for p in trainer.model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_warm_up_and_cosine_move_in_proportion():
    """Of 200 epochs, 10 of them warm-up, 20 are left, 1 of them warm-up, iteration by iteration."""
    cfg = Config.fromfile(ROOT / "configs/cifar/vit_attnres_cifar10.py")
    trainer = Trainer(cfg, 0, torch.device("cpu"), epochs=20, steps=4)
    decayed = {group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decayed == {0.0, 0.05}
    rates = []
    for _ in range(20):
        for _ in range(4):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            trainer._step(by_epoch=False)
        trainer._step(by_epoch=True)
    assert rates[:5] == pytest.approx([1e-6, 3.34e-4, 6.67e-4, 1e-3, 1e-3], rel=1e-3)
    assert all(len(set(rates[i : i + 4])) == 1 for i in range(4, 80, 4))
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * e / 19)) / 2 for e in range(19)]
    assert rates[4::4] == pytest.approx(cosine)
    cfg.param_scheduler[0].by_epoch = False
    with pytest.raises(ValueError, match="not a config of CIFAR whose learning rate follows"):
        Trainer(cfg, 0, torch.device("cpu"))


def test_crops_and_flips():
    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    offsets, flips = torch.randint(9, (9, 2)), torch.arange(9) % 2 == 0
    got = crop_and_flip(images, offsets, flips)
    padded = torch.nn.functional.pad(images, [4] * 4)
    for image, out, (y, x), flip in zip(padded, got, offsets.tolist(), flips, strict=True):
        crop = image[:, y : y + 32, x : x + 32]
        assert torch.equal(out, crop.flip(2) if flip else crop)


@pytest.mark.slow
def test_cifar_command_and_runner(cifar, tmp_path):
    """The device trainer's command, and the ordinary tools on the same config and folder."""
    root, layout, _ = cifar
    if layout == "official":
        pytest.skip("its checksums would be refused")
    config = ROOT / "configs/cifar/resnet20_mrla_cifar10.py"
    command = [sys.executable, ROOT / "tools/train_cifar.py", config, "--data-root", root,
               "--seeds", "0", "1", "--epochs", "1", "--log-dir", tmp_path / "logs"]  # fmt: skip
    done = run(*command)
    assert "| resnet20_mrla_cifar10 | 1 | 0, 1 | " in done.stdout
    assert run(*command).stdout == done.stdout  # nothing is repeated
    done = run(
        ROOT / "tools/train.py", config, "--data-root", root, "--cfg-options",
        "train_cfg.max_epochs=1", "default_hooks.logger.interval=2", cwd=tmp_path,
    )  # fmt: skip
    assert "accuracy/top1" in done.stdout + done.stderr
    other = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow/train/airplane").mkdir(parents=True)
    for words, message in (
        ([other, "--data-root", root], "not a config of CIFAR"),
        (["resnet20_mrla_cifar1.py"], "did you mean"),
        ([config, "--data-root", tmp_path / "empty"], "neither cifar-10-batches-py/"),
        ([config, "--data-root", tmp_path / "hollow"], "has no images of class 'airplane'"),
    ):
        done = run(*command[:2], *words, ok=False)
        assert message in one_error(done)

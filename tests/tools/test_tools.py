"""tools/ on real COCO images: the commands a user types, at a small scale."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrla.engine.errors import exit_with_message
from tests.conftest import ROOT
from tests.engine.resume_parts import digest
from tests.zygote import run_command

# Image scale, iterations and no pretrained weights; nothing else differs from a real run.
TINY = [
    "model.backbone.init_cfg=None",
    "train_dataloader.dataset.pipeline.2.scale=(160,128)",
    "test_dataloader.dataset.pipeline.1.scale=(160,128)",
    "val_dataloader.dataset.pipeline.1.scale=(160,128)",
    "train_dataloader.dataset.indices=6",
    "val_dataloader.dataset.indices=4",
    "test_dataloader.dataset.indices=4",
    "train_cfg.max_epochs=1",
    "default_hooks.logger.interval=1",
]
# A network that has learned nothing scores below what is kept by default.
EVERY_SCORE = ["model.test_cfg.rcnn.score_thr=0.0"]


def run(*command: object, cwd: Path | None = None, ok: bool = True, **env: str):
    if str(command[0]).endswith(".py"):
        done = run_command(*command, cwd=cwd, **env)
    else:
        done = subprocess.run(
            [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=900,
            check=False, env={**os.environ, "PYTHON": sys.executable, **env},
        )  # fmt: skip
    if ok:
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def one_error(done: subprocess.CompletedProcess) -> str:
    """The error line of a command that was refused: exit 2, no traceback."""
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def losses(log: str) -> list[float]:
    return [float(x) for x in re.findall(r"Epoch\(train\).*? loss: (\S+)", log)]


@pytest.fixture(scope="module")
def trained(coco_mini, tmp_path_factory):
    """The issue's command, started in an empty folder: nothing depends on where one stands."""
    home = tmp_path_factory.mktemp("mask_rcnn")
    config = ROOT / "configs/mask_rcnn_r50_mrla_1x.py"
    done = run(
        sys.executable, ROOT / "tools/train.py", config, "--data-root", coco_mini,
        "--cfg-options", *TINY, *EVERY_SCORE, cwd=home,
    )  # fmt: skip
    return config, home / "work_dirs/mask_rcnn_r50_mrla_1x", done.stdout + done.stderr


def test_trains_and_evaluates_on_real_images(trained):
    _, work_dir, log = trained
    assert len(losses(log)) == 3
    assert all(0 < loss < 100 for loss in losses(log))
    assert re.search(r"coco/bbox_mAP: \d", log)
    assert re.search(r"coco/segm_mAP: \d", log)
    assert log.count("mmcv ops:") == 1
    assert (work_dir / "epoch_1.pth").is_file()


def test_test_py(trained, coco_mini, tmp_path):
    config, work_dir, _ = trained
    done = run(
        ROOT / "tools/test.py", config, work_dir / "epoch_1.pth", "--data-root", coco_mini,
        "--work-dir", tmp_path, "--out", tmp_path / "out.pkl", "--show-dir", "pictures",
        "--cfg-options", *TINY, *EVERY_SCORE, "default_hooks.visualization.interval=1",
    )  # fmt: skip
    assert "coco/segm_mAP_50" in done.stdout + done.stderr
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert len(predictions) == 4
    assert {"bboxes", "scores", "labels", "masks"} <= set(predictions[0]["pred_instances"])
    assert len(list(tmp_path.glob("*/pictures/*.jpg"))) == 4


def test_mmdets_inference_apis(trained, coco_mini):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    config, work_dir, _ = trained
    checkpoint = str(work_dir / "epoch_1.pth")
    image = str(sorted((coco_mini / "val2017").glob("*.jpg"))[0])
    model = init_detector(str(config), checkpoint, device="cpu")
    sample = inference_detector(model, image)
    assert len(sample.pred_instances.bboxes) == len(sample.pred_instances.masks)
    assert model.dataset_meta["classes"][0] == "person"
    inferencer = DetInferencer(model=str(config), weights=checkpoint, device="cpu")
    result = inferencer(image, no_save_vis=True, show=False)["predictions"][0]
    torch.testing.assert_close(torch.tensor(result["scores"]), sample.pred_instances.scores)


def test_resume_goes_on(trained, coco_mini, tmp_path):
    config, work_dir, _ = trained
    done = run(
        ROOT / "tools/train.py", config, "--data-root", coco_mini, "--work-dir", tmp_path,
        "--resume", work_dir / "epoch_1.pth",
        "--cfg-options", *[o for o in TINY if "max_epochs" not in o], "train_cfg.max_epochs=2",
        "train_cfg.val_interval=5",
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert "resumed epoch: 1" in log
    assert re.search(r"Epoch\(train\)\s+\[2\]\[1/3\]", log)
    assert torch.load(tmp_path / "epoch_2.pth", weights_only=False)["meta"]["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "faster_rcnn_r50_mrla_1x",
        "retinanet_r50_mrla_1x",
        "retinanet_pvtv2-b0_mrla_1x",
        "mask_rcnn_vit-t_mrla_sfp_1x",
        "mask_rcnn_pvtv2-b0_mrla_1x",
        "mask_rcnn_pvtv2-b1_mrla_1x",
        "retinanet_pvtv2-b1_mrla_1x",
        "mask_rcnn_r50_mrla-base_1x",
        "mask_rcnn_r101_mrla_1x",
        "retinanet_r101_mrla-base_1x",
        "mask_rcnn_r50_1x",
    ],
)
def test_the_other_detectors(config, coco_mini, tmp_path):
    done = run(
        ROOT / "tools/train.py", ROOT / f"configs/{config}.py", "--data-root", coco_mini,
        "--work-dir", tmp_path, "--auto-scale-lr", "--cfg-options", *TINY,
        *(["model.test_cfg.score_thr=0.0"] if "retinanet" in config else EVERY_SCORE),
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert len(losses(log)) == 3
    assert re.search(r"coco/bbox_mAP: \d", log)
    assert "LR is set based on batch size of 16 and the current batch size is 2" in log


@pytest.mark.slow
def test_two_processes_end_with_identical_weights(coco_mini, tmp_path):
    """gloo on the CPU, chosen by itself; each process writes a digest of its weights at the end."""
    config = tmp_path / "with_digest.py"
    config.write_text(
        f"_base_ = {str(ROOT / 'configs/faster_rcnn_r50_mrla_1x.py')!r}\n"
        "imports = ['mmrla', 'tests.engine.resume_parts']\n"
        "custom_imports = dict(imports=imports, allow_failed_imports=False)\n"
        "custom_hooks = [dict(type='SyncBuffersHook'), dict(type='DigestHook')]\n"
    )
    done = run(
        ROOT / "tools/dist_train.sh", config, 2,
        "--data-root", coco_mini, "--work-dir", tmp_path / "run", "--cfg-options", *TINY,
        cwd=tmp_path, PYTHONPATH=str(ROOT),
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert re.search(r"Epoch\(train\)\s+\[1\]\[2/2\]", log)  # 6 images over 2 x 2
    digests = [(tmp_path / f"run/rank{rank}").read_text() for rank in range(2)]
    state = torch.load(tmp_path / "run/epoch_1.pth", weights_only=False)["state_dict"]
    assert digests == [digest(state)] * 2


@pytest.mark.slow
def test_dist_test(trained, coco_mini, tmp_path):
    """Two processes see the same validation set and report what one process reports."""
    config, work_dir, _ = trained
    options = ["--cfg-options", *TINY, *EVERY_SCORE]
    arguments = ["--data-root", coco_mini, "--work-dir", tmp_path, *options]
    checkpoint = work_dir / "epoch_1.pth"
    one = run(ROOT / "tools/test.py", config, checkpoint, *arguments)
    two = run(ROOT / "tools/dist_test.sh", config, checkpoint, 2, *arguments)
    found = [re.findall(r"coco/\w+: \S+", done.stdout + done.stderr) for done in (one, two)]
    assert found[0]
    assert found[0] == found[1]


# --- bad input ---

TRAIN = ROOT / "tools/train.py"
CONFIG = ROOT / "configs/retinanet_r50_mrla_1x.py"


@pytest.mark.parametrize(
    ("words", "missing", "hint"),
    [
        ([TRAIN, CONFIG], "no such folder: {}/data/coco", "--data-root DIR"),
        (
            [TRAIN, CONFIG, "--data-root", "."],
            "no such annotation file: {}/annotations/instances_train2017.json", "",
        ),
        (
            [TRAIN, CONFIG, "--data-root", "COCO",
             "--cfg-options", "model.backbone.init_cfg.checkpoint=r50.pth"],
            "model.backbone.init_cfg.checkpoint: no such file: {}/r50.pth", "",
        ),
        # did you mean
        ([TRAIN, "retinanet_r50_mrla_2x.py"], "no such config: {}/retinanet_r50_mrla_2x.py",
         str(CONFIG)),
        ([ROOT / "tools/test.py", CONFIG, "epoch_12.pth"], "no such checkpoint: {}/epoch_12.pth",
         ""),
    ],
    ids=["data root", "annotations", "initial weights", "config", "checkpoint"],
)  # fmt: skip
def test_what_is_not_there_is_named(words, missing, hint, coco_mini, tmp_path):
    words = [coco_mini if word == "COCO" else word for word in words]
    message = one_error(run(*words, cwd=tmp_path, ok=False))
    assert missing.format(tmp_path) in message
    assert hint in message
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.backbone.depth=42", "depth must be one of [18, 34, 50, 101, 152], got 42"),
        ("model.backbone.layer_attention.head_channels=48", "head_channels=48 with channels=256"),
        ("model.backbone.layer_attention.type=MRLAHeavy", "unknown layer attention 'MRLAHeavy'"),
    ],
)
def test_bad_model_is_refused_before_training_and_leaves_checkpoints(
    option, expected, coco_mini, tmp_path
):
    old = tmp_path / "epoch_12.pth"
    old.write_bytes(b"precious")
    message = one_error(
        run(
            TRAIN, CONFIG, "--data-root", coco_mini, "--work-dir", tmp_path,
            "--cfg-options", option, ok=False,
        )
    )  # fmt: skip
    assert expected in message
    assert old.read_bytes() == b"precious"
    assert not list(tmp_path.glob("epoch_1.pth"))


def test_more_processes_than_gpus(monkeypatch):
    from mmrla.engine.run.checks import check_processes

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_processes("pytorch")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes .* node with 2 GPU\(s\); allowed: 1 to 2"):
        check_processes("pytorch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_processes("pytorch")
    with pytest.raises(ValueError, match="--launcher slurm needs GPUs"):
        check_processes("slurm")


def test_dist_scripts_refuse_once(tmp_path):
    message = one_error(run(ROOT / "tools/dist_train.sh", CONFIG, 2, cwd=tmp_path, ok=False))
    assert "no such folder" in message
    message = one_error(run(ROOT / "tools/dist_train.sh", CONFIG, "two", ok=False))
    assert "got 'two'" in message
    done = run(ROOT / "tools/dist_test.sh", CONFIG, ok=False)
    assert done.returncode == 2
    assert "tools/dist_test.sh CONFIG CHECKPOINT NPROC" in done.stderr


def test_slurm_takes_a_name(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    script, path = ROOT / "tools/slurm_train.sh", f"{tmp_path}:{os.environ['PATH']}"
    done = run(script, "part", "job", CONFIG.stem, cwd=tmp_path, PATH=path)
    assert f"tools/train.py {CONFIG.stem} --launcher slurm" in done.stdout
    done = run(script, "part", "job", "retinanet_r50_mrla_2x", cwd=tmp_path, ok=False, PATH=path)
    assert str(CONFIG) in one_error(done)


def test_a_broken_pipe_is_no_bad_input():
    with pytest.raises(BrokenPipeError), exit_with_message():
        raise BrokenPipeError


def test_a_checkpoint_of_another_network_is_refused(coco_mini, tmp_path):
    torch.save({"state_dict": {"bakcbone.conv1.weight": torch.zeros(1)}}, tmp_path / "typo.pth")
    typo = tmp_path / "typo.pth"
    arguments = [CONFIG, typo, "--data-root", coco_mini, "--work-dir", tmp_path / "run"]
    message = one_error(run(ROOT / "tools/test.py", *arguments, ok=False))
    assert "no key matches the model. The checkpoint's begin with bakcbone.conv1.weight" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is fine with a GPU")
def test_amp_on_a_cpu_is_bfloat16(coco_mini):
    arguments = [TRAIN, CONFIG, "--data-root", coco_mini, "--amp", "--dry-run", "--cfg-options"]
    run(*arguments, "model.backbone.init_cfg=None")
    done = run(*arguments, "optim_wrapper.dtype=float16", ok=False)
    assert "mixed precision on a CPU is bfloat16, got optim_wrapper.dtype" in one_error(done)

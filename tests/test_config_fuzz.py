"""Mistakes in configs, tried through ``train.py --dry-run``: one line that names what is wrong."""

from __future__ import annotations

import sys
from operator import attrgetter
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmrla.cli import main
from mmrla.datasets import generate_shapes
from tests.helpers import DEMO, refusal


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("fuzz") / "data", num_train=2, num_val=1)


def dry_run(config: object, data: Path, *options: str) -> list[str]:
    """The words of a command."""
    words = ["train", str(config), "--data-root", str(data), "--dry-run"]
    return [*words, *(["--cfg-options", *options] if options else [])]


def error_of(capsys, *arguments: object) -> str:
    """The one line by which :func:`dry_run` is refused."""
    DefaultScope._instance_dict.clear()
    text = refusal(capsys, *dry_run(*arguments))
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(line) < 1000
    return line


def test_the_config_itself_is_fine(data, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(dry_run(DEMO, data))
    printed = capsys.readouterr()
    assert "error" not in printed.err
    last = printed.out.splitlines()[-1]
    assert last.startswith("dry run: fine are config, data (images: train 2, val 1), loaders, Mask")
    assert not list(tmp_path.iterdir())


def test_options_that_hold_dicts_and_loaders_without_workers(data, capsys):
    """No workers, though the config's loaders keep theirs; a schedule in Python's spelling."""
    options = [
        "train_dataloader.num_workers=0", "train_dataloader.prefetch_factor=4",
        "val_dataloader.num_workers=0",
        "param_scheduler=[{'type': 'MultiStepLR', 'milestones': [1, 2]}]",
    ]  # fmt: skip
    assert Config.fromfile(DEMO).train_dataloader.persistent_workers
    main(dry_run(DEMO, data, *options))
    for wrong, told in (
        ("param_scheduler=[{type: MultiStepLR}]", "[{'type': 'LinearLR', 'end': 500}]"),
        ("param_scheduler", "KEY=VALUE"),
    ):
        assert told in refusal(capsys, *dry_run(DEMO, data, wrong)).splitlines()[-1]


def test_a_visualizer_that_is_not_installed(data, capsys, monkeypatch):
    for name in ("torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    option = "visualizer.vis_backends=[{'type': 'TensorboardVisBackend'}]"
    assert "tensorboard" in error_of(capsys, DEMO, data, option)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("model=3", "model must be a dict, got 3"),
        ("model.backbone.depth=many", "depth must be one of"),
        ("model.backbone.layer_attention=MRLALight", "layer_attention must be None or a dict"),
        ("model.backbone.norm_eval=yes", "norm_eval must be a bool, got 'yes'"),
        ("model.backbone.out_indices=3", "out_indices must be a sequence of ints, got 3"),
        ("model.type=MaskRCN", "MaskRCN"),
        ("train_dataloader.batch_size=two", "train_dataloader.batch_size must be an int"),
        ("train_dataloader.dataset.type=CocoDatset", "train_dataloader.dataset: 'CocoDatset"),
        ("train_dataloader.dataset.on_bad=perhaps", "on_bad must be one of"),
        (
            "train_dataloader.dataset.pipeline.0.type=LoadImge",
            "dataset: 'LoadImge",
        ),
        ("train_dataloader=None", "train_dataloader must be a dict, got None"),
        ("train_cfg.max_epochs=many", "train_cfg.max_epochs must be an int, got 'many'"),
        ("train_cfg.max_epochs=0", "train_cfg.max_epochs must be at least 1"),
        ("trian_cfg.max_epochs=1", "unknown key 'trian_cfg' of the config; did you mean 'train_c"),
        ("load_form=x.pth", "unknown key 'load_form' of the config; did you mean 'load_from'?"),
        ("resumee=True", "unknown key 'resumee' of the config; did you mean 'resume'?"),
        ("wrok_dir=x", "unknown key 'wrok_dir' of the config; did you mean 'work_dir'?"),
        ("find_unused_parameter=True", "did you mean 'find_unused_parameters'?"),
        ("optim_wrapper.optimizer.lr=fast", "optim_wrapper: "),
        ("optim_wrapper.optimizer.type=Adan", "optim_wrapper.optimizer: unknown type 'Adan'"),
        ("param_scheduler=3", "param_scheduler must be a dict or a list of them, got 3"),
        ("param_scheduler.0.type=LinearL", "param_scheduler[0]: unknown type 'LinearL'"),
        ("param_scheduler.7.type=LinearLR", "Index 7"),
        ("param_scheduler=[linear]", "param_scheduler[0] must be a dict, got the string 'linear'"),
        ("train_dataloader.sampler.type=Shuffled", "Shuffled"),
        ("train_dataloader.sampler.shufle=True", "shufle"),
        ("val_evaluator.metric=bbx", "bbx"),
        ("visualizer.vis_backends.0.type=Tensorbord", "visualizer.vis_backends[0]: unknown type"),
        ("default_hooks.logger.interval=0", "interval must be greater than 0"),
        ("val_evaluator.type=CocoMetrc", "val_evaluator: unknown type 'CocoMetrc'"),
    ],
    ids=lambda value: value if "=" in value else "",
)
def test_options(option, named, data, capsys):
    assert named in error_of(capsys, DEMO, data, option)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("_base_ = './not_there.py'", "not_there.py"),
        ("_base_ = 'mmdet::no/such.py'", "no/such.py"),
        ("_base_ = 'mmrla::mask_rcnn_r50_mrla_2x.py'", "did you mean mask_rcnn_r50_mrla_1x"),
        ("_base_ = 'mmrla::../../cli.py'", "leads out of mmrla's configs"),
        ("_base_ = 3", "AttributeError"),
        ("_base_ = ['mmrla::mask_rcnn_r50_mrla_1x.py', 'mmrla::retinanet_r50_mrla_1x.py']",
         "Duplicate key"),
        ("model = dict(", "SyntaxError"),
        ("model = undefined", "undefined"),
        ("x = 1 / 0", "ZeroDivisionError"),
        ("", "model must be a dict, got None"),
        ("custom_imports = dict(imports=['no_such_module'], allow_failed_imports=False)",
         "no_such_module"),
    ],
    ids=["base", "mmdet", "mmrla", "climbing", "wrong type", "two bases", "syntax", "name",
         "arithmetic", "empty", "imports"],
)  # fmt: skip
def test_files(text, named, data, tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(text)
    line = error_of(capsys, config, data)
    assert named in line
    if text:
        assert str(config) in line


SECTIONS = [
    "model", "model.backbone", "model.backbone.layer_attention", "model.neck", "model.rpn_head",
    "model.roi_head", "model.roi_head.bbox_head", "model.roi_head.mask_head", "train_dataloader",
    "train_dataloader.dataset", "val_dataloader", "train_cfg", "optim_wrapper.optimizer",
]  # fmt: skip


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_misspelt_keys(examples, data, capsys):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(
        max_examples=examples, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(source=st.data())
    def check(source):
        section = source.draw(st.sampled_from(SECTIONS))
        keys = sorted(k for k in attrgetter(section)(Config.fromfile(DEMO)) if k[0] != "_")
        key = source.draw(st.sampled_from(keys))
        place = source.draw(st.integers(0, len(key) - 1))
        how = source.draw(st.sampled_from(["dropped", "doubled", "other"]))
        middle = {"dropped": "", "doubled": key[place] * 2, "other": "q"}[how]
        wrong = key[:place] + middle + key[place + 1 :]
        if wrong and wrong not in keys:
            line = error_of(capsys, DEMO, data, f"{section}.{wrong}=1")
            assert wrong in line, line

    check()

"""The wheel, as somebody installs and uses it away from any checkout."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config

import mmrla
from mmrla import cli
from tests.conftest import ROOT
from tests.helpers import python

SOURCES = ("mmrla", "configs", "tools", "pyproject.toml", "model-index.yml", "README.md", "LICENSE")
PIP = ["-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # A copy, because a build leaves folders behind, which a later one would take stale files from.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    python(*PIP, "--no-cache-dir", "wheel", "--no-deps", "--no-index", "--no-build-isolation",
           "--wheel-dir", out, source, cwd=out)  # fmt: skip
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An empty folder with nothing but the wheel in it."""
    target = tmp_path_factory.mktemp("site")
    python(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def run(installed: Path, cwd: Path, *command: object, ok: bool = True) -> str:
    """Run the interpreter with the installed wheel in front; returns what it printed."""
    return python(*command, cwd=cwd, ok=ok, path=installed)


def test_wheel_holds_configs_tools_and_index(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    below = {n.removeprefix("mmrla/.mim/") for n in names if n.startswith("mmrla/.mim/")}
    shipped = {
        path.relative_to(ROOT).as_posix()
        for name in ("configs", "tools")
        for path in (ROOT / name).rglob("*")
        if path.suffix in (".py", ".sh", ".yml") and "__pycache__" not in path.parts
    }
    assert below == shipped | {"model-index.yml"}
    assert not [n for n in names if n.startswith(("tests/", "configs/", "tools/"))]
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mmrla").rglob("*.py")}
    assert modules <= names


def test_configs_of_the_wheel(installed, tmp_path):
    for name, text in {
        "mine": "'mmrla::mask_rcnn_r50_mrla_1x.py'\nmodel = dict(backbone=dict(depth=101))",
        "also": "['mmrla::imagenet/resnet50_mrla_in1k.py']",
        # For programs that do not import mmrla.
        "alone": "__import__('mmrla').config_path('mask_rcnn_r50_mrla_1x')",
    }.items():
        (tmp_path / f"{name}.py").write_text(f"_base_ = {text}\n")
    code = (
        "from mmengine.config import Config; c = Config.fromfile('alone.py');"
        "print(c.model.backbone.type)"
    )
    assert run(installed, tmp_path, "-c", code).split()[-1] == "mmrla.MRLAResNet"
    code = (
        "import json, mmrla; from mmengine.config import Config;"
        "mine, also = Config.fromfile('mine.py'), Config.fromfile('also.py');"
        "got = mmrla.get_config('mask_rcnn_r50_mrla_1x');"
        "print(json.dumps([mmrla.__file__, got.model.to_dict(), mine.model.to_dict(),"
        " also.to_dict()['model'], mmrla.list_configs('mask*'), mmrla.list_configs()]))"
    )
    where, got, mine, also, masks, names = json.loads(run(installed, tmp_path, "-c", code))
    assert Path(where).is_relative_to(installed)
    expected = Config.fromfile(ROOT / "configs/mask_rcnn_r50_mrla_1x.py").model.to_dict()
    expected = json.loads(json.dumps(expected))
    assert got == expected
    expected["backbone"]["depth"] = 101
    assert mine == expected
    path = ROOT / "configs/imagenet/resnet50_mrla_in1k.py"
    assert also == json.loads(json.dumps(Config.fromfile(path).model.to_dict()))
    assert masks == sorted(p.stem for p in (ROOT / "configs").glob("mask*.py"))
    assert names == mmrla.list_configs()


def test_commands_of_the_wheel(installed, coco_mini, tmp_path):
    """From a folder with nothing in it, on a config that only the wheel has."""
    listed = run(installed, tmp_path, "-m", "mmrla", "list", "mask*")
    assert listed.split() == mmrla.list_configs("mask*")
    (script,) = (installed / "bin").glob("mmrla*")
    assert run(installed, tmp_path, script, "--version").strip() == f"mmrla {mmrla.__version__}"
    run(
        installed, tmp_path, script, "train", "mask_rcnn_r50_mrla_1x", "--data-root", coco_mini,
        "--cfg-options", "model.backbone.init_cfg=None", "--dry-run",
    )  # fmt: skip
    assert "usage: mmrla train" in run(installed, tmp_path, script, "train", "--help")
    message = run(installed, tmp_path, script, "train", "mask_rcnn_r50_mrla", ok=False)
    assert "did you mean" in message
    assert str(installed / "mmrla/.mim/configs/mask_rcnn_r50_mrla_1x.py") in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_demo_of_the_wheel(installed, tmp_path):
    options = ["--epochs", 1, "--num-train", 16, "--num-val", 4, "--pictures", 1]
    printed = run(installed, tmp_path, "-m", "mmrla", "demo", "--work-dir", "demo", *options)
    assert "AP in percent on 4 validation images" in printed
    assert len(list((tmp_path / "demo/pictures").glob("*.png"))) == 1


COMMANDS = {name: name for name in (*cli.COMMANDS, *cli.SCRIPTS, *cli.OWN)}
COMMANDS["complexity"] = "cost flops"  # the name of earlier versions
COMMANDS |= {f"tools/{name}_checkpoint.py": name for name in ("convert", "publish")}
for command in ("check-data", "check-gpu", "export-onnx", "test", "train", "train-cifar"):
    COMMANDS[f"tools/{command.replace('-', '_')}.py"] = command
COMMANDS |= {
    "tools/analysis/attention_maps.py": "figure maps",
    "tools/analysis/query_similarity.py": "figure similarity",
    "tools/analysis/score_cam.py": "figure cam",
    "tools/analysis/class_attention.py": "figure class-token",
    "tools/analysis/complexity.py": "cost flops",
    "tools/analysis/flops_vs_resolution.py": "cost resolution",
    "tools/analysis/memory_vs_depth.py": "cost memory",
    "tools/analysis/layout_speed.py": "cost layout",
    "tools/benchmark/compare.py": "cost compare",
    "tools/benchmark/run.py": "cost speed",
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_tool_is_there(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    code = 0  # what runs under torchrun's record returns instead of leaving
    try:
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            cli.main([name, "--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert not code
    assert f"usage: mmrla {COMMANDS[name]} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [([], "COMMAND"), (["trian"], "'train'"), (["list", "no such*"], "'no such*'")],
)
def test_bad_commands(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code
    assert said in capsys.readouterr().err


def test_reader_that_leaves():
    """``mmrla list | head -1`` prints no traceback, and neither does Python at its end."""
    code = "import mmrla.cli as c; c.list_configs = lambda p: ['x' * 99] * 9999; c.main(['list'])"
    for command in (["-m", "mmrla", "list"], ["-c", code]):
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        )  # fmt: skip
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_other_broken_pipes_are_errors(monkeypatch):
    def fail(pattern):
        raise BrokenPipeError("a worker has died")

    monkeypatch.setattr(cli, "list_configs", fail)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)  # one with a file descriptor
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    with pytest.raises(BrokenPipeError, match="a worker has died"):
        cli.main(["list"])


@pytest.mark.parametrize(
    ("installed", "requirements"),
    [("onedl_mmdetection", "requirements/openmmlab.txt"), ("mmdet", "requirements.txt")],
)
def test_make_does_not_install_one_family_over_the_other(tmp_path, installed, requirements):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    info = site / f"{installed}-3.3.0.dist-info"
    for folder in (site / "mmdet", info):
        folder.mkdir()
    (site / "mmdet/__init__.py").touch()
    (info / "top_level.txt").write_text("mmdet\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {installed}\nVersion: 3.3.0\n")
    done = subprocess.run(
        ["bash", ROOT / "requirements/install.sh"], capture_output=True, text=True, check=False,
        env={**os.environ, "VENV": str(tmp_path), "REQUIREMENTS": requirements},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"has {installed}, whose files {requirements} would overwrite" in done.stderr


def test_unknown_names():
    with pytest.raises(FileNotFoundError, match="did you mean .*imagenet/resnet50_mrla_in1k"):
        mmrla.get_config("resnet50_mrla_in1k")
    with pytest.raises(FileNotFoundError, match="no config 'zzz'"):
        mmrla.config_path("mmrla::zzz.py")
    with pytest.raises(AssertionError):  # mmengine's own answer for others
        Config._get_cfg_path("mmother::a/b.py", "x.py")


def test_model_index_is_valid_and_what_its_command_writes():
    from modelindex.load_model_index import load

    tool = cli.load_script("analysis/model_index.py")
    index = load(str(ROOT / "model-index.yml"))
    assert index.check(silent=True) == []
    imported = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    assert len({c.name for c in index.collections}) == len(imported)
    models = [m for name in imported for m in yaml.safe_load((ROOT / name).read_text())["Models"]]
    by_config = {m["Config"].removeprefix("configs/").removesuffix(".py"): m for m in models}
    assert len(by_config) == len(models)
    assert sorted(by_config) == mmrla.list_configs()
    for name in mmrla.list_configs()[::6]:  # reading all takes long
        assert by_config[name] == tool.entry(name), "run make model-index"

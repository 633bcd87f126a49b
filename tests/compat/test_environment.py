"""What mmrla check-env says of environments that are right and wrong."""

from __future__ import annotations

import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

import mmrla
from mmrla import cli
from mmrla.compat import environment, warn_about_versions

FORKS = dict(
    torch=["torch"], torchvision=["torchvision"], mmengine=["onedl-mmengine"], mmcv=["onedl-mmcv"],
    mmdet=["onedl-mmdetection"], mmpretrain=["onedl-mmpretrain"], pycocotools=["pycocotools"],
    numpy=["numpy"], cv2=["opencv-python"], triton=["triton"],
)  # fmt: skip
VERSIONS = dict(torch="2.11.0+cu130", torchvision="0.26.0", mmengine="0.10.12", mmcv="2.3.6",
                mmdet="3.5.1", mmpretrain="1.3.6", pycocotools="2.0.11", numpy="2.2.6",
                cv2="4.12.0", triton="3.6.0")  # fmt: skip


class World:
    """An installation made up for a test."""

    def __init__(self) -> None:
        self.providers = {name: list(found) for name, found in FORKS.items()}
        self.versions = dict(VERSIONS)
        self.broken: dict[str, Exception] = {}
        self.ops = "fallback"
        self.driver: str | None = None
        self.cuda: str | None = "13.0"
        self.archs = ["sm_80", "sm_90", "compute_90"]
        self.gpus: list[tuple[int, int]] = []

    def import_module(self, name: str):
        if name in self.broken:
            raise self.broken[name]
        if name == "mmrla" or name.startswith("mmrla."):
            return mmrla
        if name == "mmcv._ext":
            return SimpleNamespace()
        if name not in self.versions:
            raise ModuleNotFoundError(f"No module named {name!r}")
        module = SimpleNamespace(__version__=self.versions[name])
        module.version = SimpleNamespace(cuda=self.cuda)
        module.cuda = SimpleNamespace(
            is_available=lambda: bool(self.gpus),
            device_count=lambda: len(self.gpus),
            get_arch_list=lambda: self.archs,
            get_device_name=lambda index: "some GPU",
            get_device_capability=lambda index: self.gpus[index],
        )
        return module

    def version(self, distribution: str) -> str:
        for name, found in self.providers.items():
            if distribution in found and name in self.versions:
                first = distribution == found[0]
                return self.versions[name] if first else f"{self.versions[name]}.1"
        raise PackageNotFoundError(distribution)


@pytest.fixture
def world(monkeypatch) -> World:
    world = World()
    monkeypatch.setattr(environment, "packages_distributions", lambda: world.providers)
    monkeypatch.setattr(environment, "version", world.version)
    monkeypatch.setattr(environment, "ops_in_use", lambda: world.ops)
    monkeypatch.setattr(environment, "_driver", lambda: world.driver)
    monkeypatch.setattr(environment.importlib, "import_module", world.import_module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return world


def originals(world: World) -> None:
    world.providers.update(mmengine=["mmengine"], mmcv=["mmcv-lite"], mmdet=["mmdet"],
                           mmpretrain=["mmpretrain"])  # fmt: skip
    world.versions.update(torch="2.1.2", torchvision="0.16.2", mmengine="0.10.7", mmcv="2.1.0",
                          mmdet="3.3.0", mmpretrain="1.2.0", numpy="1.26.4")  # fmt: skip


def hopper(world: World) -> None:
    world.driver, world.gpus = "580.1", [(9, 0), (8, 6), (12, 0)]


@pytest.mark.parametrize("change", [lambda world: None, originals, hopper])
def test_nothing_is_wrong(world, change):
    change(world)
    assert environment.examine().problems == []
    text = environment.report()
    assert text.endswith("nothing is wrong")
    for name, version in world.versions.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert line.split(maxsplit=1)[1] == (
            f"{version} (from {world.providers[name][0]} {version})"
        )


def numpy_2_for_old_torch(world: World) -> None:
    originals(world)
    world.versions["numpy"] = "2.0.1"


def broken(name: str, error: Exception, **more):
    """What cannot be imported, and other differences of the installation."""

    def change(world: World) -> None:
        world.broken[name] = error
        vars(world).update(more)

    return change


def differing(**values):
    return lambda world: vars(world).update(values)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (numpy_2_for_old_torch, ["numpy 2.0.1: torch 2.1.2 is built for numpy<2"]),
        (lambda w: w.providers["mmcv"].append("mmcv"),
         ["mmcv and onedl-mmcv both provide mmcv", "two families are mixed: "]),
        (lambda w: w.providers.update(mmdet=["mmdet"]),
         ["two families are mixed: forks: .*onedl-mmcv.*; originals: mmdet"]),
        (lambda w: w.versions.pop("mmdet") and w.providers.pop("mmdet"),
         ["mmdet is not installed; it comes with onedl-mmdetection or mmdet"]),
        (broken("cv2", ImportError("libGL.so.1: cannot open")),
         ["import cv2 fails: libGL.so.1"]),
        (lambda w: w.versions.update(torchvision="0.25.0"), ["wants 0.26"]),
        (lambda w: w.versions.update(mmdet="3.2.0"), ["mmdet 3.2.0 is older than 3.3.0"]),
        (differing(driver="580.1", cuda=None), ["torch is built for CPU alone"]),
        (differing(driver="470.2"), ["driver 470.2 may be too old for CUDA 13.0"]),
        (differing(driver="580.1", gpus=[(7, 0)]),
         ["no kernels for GPU 0 .some GPU, sm_70.; it has sm_80"]),
        (broken("mmrla.models", TypeError("NoneType takes no arguments")),
         ["import mmrla.models fails: TypeError: NoneType takes no arguments"]),
        (broken("mmcv._ext", ImportError("undefined symbol: _ZN3c10"), ops="compiled"),
         ["do not load .undefined symbol: _ZN3c10.: built for another torch"]),
    ],
)  # fmt: skip
def test_a_line_for_each_thing_that_is_wrong(world, change, messages):
    change(world)
    problems = environment.examine().problems
    assert len(problems) == len(messages), problems
    for problem, message in zip(problems, messages, strict=True):
        assert re.search(message, problem), problem
        assert "\n" not in problem


def test_a_missing_extra_is_not_wrong(world):
    world.broken["mmrla.models"] = ModuleNotFoundError("No module named 'timm'", name="timm")
    found = environment.examine()
    assert found.problems == []
    assert ("mmrla.models", "needs timm, which is not installed") in found.lines
    world.broken["mmrla.models"] = ModuleNotFoundError("No module named 'einops'", name="einops")
    (problem,) = environment.examine().problems
    assert "import mmrla.models fails: ModuleNotFoundError: No module named 'einops'" in problem


def test_this_environment(capsys):
    cli.main(["check-env"])
    text = capsys.readouterr().out
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in text
    assert "mmcv ops" in text
    for name in ("torch", "mmengine", "mmcv", "mmdet", "mmpretrain"):
        assert sys.modules[name].__version__ in text


def test_versions_warn_and_do_not_stop(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_versions()
    monkeypatch.setattr(sys.modules["mmcv"], "__version__", "2.0.9")
    with pytest.warns(UserWarning, match="mmcv 2.0.9 is older than 2.1.0"):
        warn_about_versions()

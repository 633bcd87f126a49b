"""Installed packages, their origin, and problems with them. Nothing here stops a run."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from types import ModuleType
from typing import Any

from mmrla.compat.mm_packages import multimodal_obstacle
from mmrla.compat.mmcv_fallback import ops_in_use
from mmrla.version import __version__

# Module: the distributions that may provide it and the version of each that mmrla is tested with:
# first the maintained forks (requirements.txt), then the originals (requirements/openmmlab.txt).
TESTED: dict[str, dict[str, str]] = {
    "torch": {"torch": "2.1.2 or 2.11.0"}, "torchvision": {"torchvision": "0.16.2 or 0.26.0"},
    "mmengine": {"onedl-mmengine": "0.10.12", "mmengine": "0.10.7", "mmengine-lite": "0.10.7"},
    "mmcv": {"onedl-mmcv": "2.3.6", "mmcv-lite": "2.1.0", "mmcv": "2.1.0"},
    "mmdet": {"onedl-mmdetection": "3.5.1", "mmdet": "3.3.0"},
    "mmpretrain": {"onedl-mmpretrain": "1.3.6", "mmpretrain": "1.2.0"},
    "pycocotools": {"pycocotools": "2.0.11"}, "numpy": {"numpy": "1.26 or 2"},
    "cv2": {"opencv-python": "4", "opencv-python-headless": "4"}, "triton": {"triton": "3"},
}  # fmt: skip
OPTIONAL = {"triton"}
# Packages of pyproject.toml's extras that a public module may need.
EXTRAS = {"timm"}
MINIMUM: dict[str, str] = {
    "torch": "2.1", "torchvision": "0.16", "mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.3.0",
    "mmpretrain": "1.2.0",
}  # fmt: skip
PYTHONS = ((3, 10), (3, 12))


@dataclass
class Environment:
    """Result of :func:`examine`."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    """What it is, and what was found."""
    problems: list[str] = field(default_factory=list)
    """A line for each problem."""

    def text(self) -> str:
        """Lines for people, the problems last."""
        width = max(len(name) for name, _ in self.lines)
        lines = [f"{name:<{width}}  {value}" for name, value in self.lines]
        wrong = [f"  - {problem}" for problem in self.problems]
        return "\n".join([*lines, "", "wrong:" if wrong else "nothing is wrong", *wrong])


def numbers(text: str) -> tuple[int, ...]:
    """The release of a version, such as ``(2, 1, 2)`` of ``'2.1.2+cu121'``."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def report() -> str:
    """The output of ``mmrla check-env``."""
    return examine().text()


def examine() -> Environment:
    """Examine interpreter, packages, mmcv's operations, GPU and driver."""
    env = Environment()
    low, high = PYTHONS
    env.lines.append(("python", f"{platform.python_version()} ({sys.executable})"))
    if not low <= sys.version_info[:2] <= high:
        env.problems.append(
            f"Python {platform.python_version()}: mmrla is made for {low[0]}.{low[1]} to "
            f"{high[0]}.{high[1]}"
        )
    env.lines.append(("mmrla", f"{__version__} ({os.path.dirname(os.path.dirname(__file__))})"))
    providers = packages_distributions()
    modules: dict[str, ModuleType] = {}
    for name in TESTED:
        _examine_package(name, providers.get(name, ()), env, modules)
    _examine_combination(env, modules, providers)
    _examine_ops(env, modules)
    obstacle = multimodal_obstacle()
    if obstacle:
        env.lines.append(("mmpretrain multimodal", f"switched off: {obstacle}"))
    _examine_own_modules(env, modules)
    if "torch" in modules:
        _examine_gpu(env, modules["torch"])
    backend = os.environ.get("MMRLA_BACKEND")
    env.lines.append(("MMRLA_BACKEND", backend or "not set (chosen for each call)"))
    return env


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _examine_package(
    name: str, found: Any, env: Environment, modules: dict[str, ModuleType]
) -> None:
    """Version, origin, and whether it can be imported."""
    distributions = sorted({d for d in found if d.lower().replace("_", "-") in TESTED[name]})
    distributions = distributions or sorted(set(found))
    try:
        # Deprecations of others are not what is wrong here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modules[name] = importlib.import_module(name)
    except Exception as error:
        if not distributions:
            env.lines.append((name, "not installed"))
            if name not in OPTIONAL:
                names = " or ".join(TESTED[name])
                env.problems.append(f"{name} is not installed; it comes with {names}")
            return
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        env.lines.append((name, f"does not import (from {', '.join(distributions)})"))
        env.problems.append(f"import {name} fails: {reason}")
        return
    own = getattr(modules[name], "__version__", None)
    installed = own or (_version(distributions[0]) if distributions else "unknown")
    origin = ", ".join(f"{d} {_version(d)}" for d in distributions) or "no distribution"
    env.lines.append((name, f"{installed} (from {origin})"))
    # Two of one version are the same files, as OpenCV's with and without windows.
    if len({_version(d) for d in distributions}) > 1:
        env.problems.append(
            f"{' and '.join(distributions)} both provide {name} and overwrite each other: "
            "uninstall all of them, then install one"
        )
    least = MINIMUM.get(name)
    if least and numbers(str(installed)) < numbers(least):
        env.problems.append(f"{name} {installed} is older than {least}, the oldest that is tested")


def _examine_combination(env: Environment, modules: dict[str, ModuleType], providers: Any) -> None:
    """Packages that are incompatible with each other."""
    families: dict[str, list[str]] = {}
    for name in ("mmengine", "mmcv", "mmdet", "mmpretrain"):
        for distribution in set(providers.get(name, ())):
            family = "forks" if distribution.lower().startswith("onedl") else "originals"
            families.setdefault(family, []).append(distribution)
    if len(families) > 1:
        env.problems.append(
            "packages of two families are mixed: "
            + "; ".join(f"{family}: {', '.join(sorted(d))}" for family, d in families.items())
            + "; uninstall both, then install one"
        )
    torch, vision = (numbers(str(modules[n].__version__)) if n in modules else ()
                     for n in ("torch", "torchvision"))  # fmt: skip
    # torchvision 0.16 goes with torch 2.1, 0.17 with 2.2, and so on.
    if torch[:1] == (2,) and vision[:1] == (0,) and vision[1] - torch[1] != 15:
        env.problems.append(
            f"torchvision {modules['torchvision'].__version__} does not go with torch "
            f"{modules['torch'].__version__}, which wants 0.{torch[1] + 15}"
        )
    if "numpy" in modules and torch and torch < (2, 3):
        installed = modules["numpy"].__version__
        if numbers(installed)[0] >= 2:
            env.problems.append(
                f"numpy {installed}: torch {modules['torch'].__version__} is built for numpy<2"
            )


def _examine_ops(env: Environment, modules: dict[str, ModuleType]) -> None:
    """The implementation of mmcv's operations."""
    texts = {
        "compiled": "compiled extension",
        "fallback": "mmrla's fallback over torchvision's kernels",
        "none": "not available",
    }
    try:
        kind = ops_in_use()
    except Exception:  # a broken mmcv has been reported
        kind = "none"
    env.lines.append(("mmcv ops", texts[kind]))
    if kind == "none" or "mmcv" not in modules:
        return
    try:
        importlib.import_module("mmcv._ext")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = ": built for another torch; rebuild it" if kind == "compiled" else ""
        env.problems.append(f"mmcv's operations do not load ({reason}){hint}")


def _examine_own_modules(env: Environment, modules: dict[str, ModuleType]) -> None:
    """Import every public module of mmrla, as its users do."""
    if any(name not in modules for name in TESTED if name not in OPTIONAL):
        env.lines.append(("mmrla's modules", "not imported, as packages are missing or broken"))
        return
    folders = importlib.import_module("mmrla").__path__
    names = [m.name for m in pkgutil.iter_modules(folders) if m.name != "__main__"]
    logging.disable(logging.INFO)  # or their own lines would precede the report
    try:
        for name in names:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(f"mmrla.{name}")
            except Exception as error:
                package = (getattr(error, "name", None) or "").partition(".")[0]
                if package in EXTRAS:
                    env.lines.append((f"mmrla.{name}", f"needs {package}, which is not installed"))
                    continue
                reason = str(error).partition("\n")[0]
                env.problems.append(f"import mmrla.{name} fails: {type(error).__name__}: {reason}")
    finally:
        logging.disable(logging.NOTSET)
    env.lines.append(("mmrla's modules", ", ".join(names)))


def _examine_gpu(env: Environment, torch: Any) -> None:
    """GPU and driver against the torch build."""
    built = torch.version.cuda
    env.lines.append(("torch is built for", f"CUDA {built}" if built else "CPU"))
    driver = _driver()
    if driver is not None:
        env.lines.append(("driver", driver))
    if not torch.cuda.is_available():
        env.lines.append(("GPU", "none in use"))
        if driver is not None:
            if built is None:
                env.problems.append("there is an NVIDIA driver, but torch is built for CPU alone")
            elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
                env.problems.append("CUDA_VISIBLE_DEVICES is empty, which hides every GPU")
            else:
                env.problems.append(
                    f"torch cannot use the GPU: driver {driver} may be too old for CUDA {built}"
                )
        return
    archs = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        sm = f"sm_{capability[0]}{capability[1]}"
        env.lines.append((f"GPU {index}", f"{name}, {sm}"))
        if archs and not _runs_on(capability, archs):
            env.problems.append(
                f"torch has no kernels for GPU {index} ({name}, {sm}); it has {', '.join(archs)}"
            )


def _runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether kernels run: binaries in a major version, PTX (``compute_``) on anything newer."""
    for arch in archs:
        kind, _, digits = arch.rstrip("abcdefghijklmnopqrstuvwxyz").partition("_")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def warn_about_versions() -> None:
    """Warn once if a package in use is older than the oldest tested version."""
    for name, least in MINIMUM.items():
        installed = getattr(sys.modules.get(name), "__version__", None)
        if installed is not None and numbers(str(installed)) < numbers(least):
            warnings.warn(
                f"{name} {installed} is older than {least}, the oldest that mmrla is tested with; "
                "mmrla check-env shows more",
                stacklevel=2,
            )

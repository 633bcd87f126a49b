from __future__ import annotations

import subprocess
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import ROOT, overlay_environment

# What pip says when it cannot reach an index or the index lacks the release.
UNREACHABLE = ("No matching distribution", "Could not find a version", "Connection", "Max retries")


@pytest.fixture(scope="session")
def is_fork() -> bool:
    """Whether the mm packages here are the maintained forks."""
    return any(name.startswith("onedl") for name in packages_distributions()["mmengine"])


@pytest.fixture(scope="session")
def projects(is_fork, tmp_path_factory) -> Path:
    """The interpreter of an environment over this one that has other mm projects too."""
    python = overlay_environment(tmp_path_factory.mktemp("projects"))
    requirements = "projects.txt" if is_fork else "projects-openmmlab.txt"
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet",
         "-r", ROOT / "requirements" / requirements],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    if done.returncode:
        if any(words in done.stderr for words in UNREACHABLE):
            pytest.skip(f"{requirements} cannot be had: {done.stderr.strip().splitlines()[-1]}")
        raise AssertionError(done.stderr)
    return python

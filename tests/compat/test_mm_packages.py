"""mm packages with a transformers that is too new for them, and what they print on import."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mmrla.compat.mm_packages import multimodal_obstacle
from tests.conftest import ROOT
from tests.helpers import python


def transformers(folder: Path, version: str, text: str = "") -> None:
    """A package of that name and version, which lacks what mmpretrain wants of it."""
    info = folder / f"transformers-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n"
    )
    (folder / "transformers").mkdir()
    (folder / "transformers/__init__.py").write_text(text)


def test_transformers_5(tmp_path):
    """check-env imports every public module and names what is switched off."""
    # torch 2.1 patches this class whenever there is a transformers.
    text = "class configuration_utils:\n    class PretrainedConfig: pass\n"
    transformers(tmp_path, "5.0.0", text)
    report = python("-m", "mmrla", "check-env", cwd=tmp_path, path=f"{tmp_path}:{ROOT}")
    (line,) = (x for x in report.splitlines() if x.startswith("mmpretrain multimodal"))
    assert "switched off: transformers 5.0.0 is too new" in line
    (line,) = (x for x in report.splitlines() if x.startswith("mmrla's modules"))
    folders = {path.parent.name for path in (ROOT / "mmrla").glob("[a-z]*/__init__.py")}
    assert folders <= set(line.replace(",", "").split())
    assert report.rstrip().endswith("nothing is wrong")
    assert report.startswith("python ")  # no log line or message before it


@pytest.mark.parametrize(
    ("version", "text", "message"),
    [
        ("4.99.1", "", "transformers 4.99.1 has no BasicTokenizer, PreTrainedModel"),
        ("4.99.1", "BasicTokenizer = PreTrainedModel = object", "No module named .*pytorch_utils"),
        ("4.99.1", "raise OSError('libfoo.so')", "4.99.1 does not import: libfoo.so"),
        ("5.1", "raise OSError('never imported')", "5.1 is too new"),
    ],
)
def test_obstacles(tmp_path, monkeypatch, version, text, message):
    transformers(tmp_path, version, text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    obstacle = multimodal_obstacle()
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert obstacle is not None
    assert re.search(message, obstacle)

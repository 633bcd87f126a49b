"""What README.md, CONTRIBUTING.md and docs/ name is there, and the site has it all."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_docs import OF_PAGES, PAGES


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1\s*$", "", page.read_text(), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """A page's headings as code hosts and the site name them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", prose(page), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found


@OF_PAGES
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def expanded(path: str) -> list[str]:
    """Braces as a shell expands them; what stands for a name, as a glob."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if not braces:
        return [re.sub(r"<\w+>", "*", path)]
    return [p for word in braces[1].split(",") for p in
            expanded(path[: braces.start()] + word + path[braces.end() :])]  # fmt: skip


def test_every_path_is_there():
    folders = "configs|tools|docs|requirements|tests|mmrla"
    named = re.compile(rf"(?<![\w/.~-])(?:{folders})/[\w./*{{}},<>-]*")
    count = 0
    for page in PAGES:
        for written in named.findall(page.read_text()):
            for path in expanded(written.rstrip(".,:")):
                if path not in ("configs/bolts.py", "configs/cells.py"):  # the reader's
                    assert list(ROOT.glob(path.rstrip("/"))), f"{page.name} names {written}"
                    count += 1
    assert count > 100


def test_every_make_target_variable_and_option_is_there():
    """Options in the text; blocks are run."""
    makefile = (ROOT / "Makefile").read_text()
    known = makefile + (ROOT / "tools/dist_train.sh").read_text()
    sources = [*(ROOT / "tools").rglob("*"), *(ROOT / "mmrla").rglob("*.py")]
    source = "\n".join(path.read_text() for path in sources if path.suffix in (".py", ".sh"))
    options = {"--help", "--no-deps", "--nproc_per_node"}
    options |= set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", source))
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"
        for variable in re.findall(r"`([A-Z_]+)=[^`\s]*`", text):
            if not variable.startswith("MMRLA_"):
                assert re.search(rf"\b{variable}\b", known), f"{page.name}: {variable}"
        code = " ".join(re.findall(r"`([^`]+)`", prose(page)))
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in options, f"{page.name} names {option}"


def test_home_lists_every_page():
    for folder in (ROOT / "docs", ROOT / "docs/api"):
        home = (folder / "README.md").read_text()
        for page in folder.glob("*.md"):
            assert page.name == "README.md" or f"]({page.name})" in home, page.name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="requirements/docs.txt is not installed")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_site_needs_nothing_else(site):
    """No script, style or font from elsewhere; equations are drawn by the browser itself."""
    elsewhere = r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://[^>]*"
    for page in site.rglob("*.html"):
        html = page.read_text()
        assert not re.findall(elsewhere, html), page
        assert "arithmatex" not in html, page
    concepts = (site / "concepts.html").read_text()
    source = re.sub(r"`[^`\n]*`", "", prose(ROOT / "docs/concepts.md"))
    assert concepts.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, re.S))
    assert not re.search(r"\$[\\A-Za-z(]", re.sub(r"<script.*?</script>", "", concepts, flags=re.S))


def test_site_has_the_public_names_and_pages(site):
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    assert len(pages) == 12
    for page in pages:
        name = "mmrla" if page.stem == "mmrla" else f"mmrla.{page.stem}"
        without_timm = page.stem == "timm" and importlib.util.find_spec("timm") is None
        if page.name == "README.md" or without_timm:
            continue
        ids = re.findall(r'id="(mmrla\.[\w.]+)"', (site / f"api/{page.stem}.html").read_text())
        shown = {found.rpartition(".")[2] for found in ids}
        # timm adds the names of models that are registered with it.
        public = importlib.import_module(name).__all__
        public = {n for n in public if name != "mmrla.timm" or "_mrla_" not in n}
        assert public - {"__version__"} <= shown, name
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    names = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    assert {"index.html", "contributing.html", *(f"{name}.html" for name in names)} <= found
    # The texts of configs are found by their names in the tables.
    assert not [location for location in found if location.startswith("source/")]
    assert (site / "source/configs/mask_rcnn_r50_mrla_1x.py.html").is_file()

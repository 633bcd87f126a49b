"""README.md, CONTRIBUTING.md and docs/: every block runs, and everything that they name is there.

Commands run in a scratch checkout, as typed but for a few options behind them (``WAYS``): training
and testing stop at ``--dry-run``, ``make`` says what it would do, long figures are drawn of smaller
networks. Python is a config, which is built, or code, which is run. A block that cannot be run
says why in the line before it: ``<!-- not run: reason -->``.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, LOOPS, MODELS, STRATEGIES, DefaultScope

from mmrla import config_path, list_configs
from mmrla.checkpoints import to_released
from mmrla.datasets import generate_shapes
from mmrla.models import MRLAResNet
from tests.conftest import ROOT
from tests.datasets.test_voc import write_voc
from tests.zygote import run_command

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = {
    "installs packages",
    "installs git hooks",
    "run by tests/projects",
    "run by tests/test_names.py",
    "run by tests/commands/test_run.py on data of its own",
    "needs DeepSpeed and several processes",
}
SHELL, TEXT = {"bash", "shell", "sh", "console"}, {"text", "bibtex", "diff"}
SMALL = (
    "--cfg-options model.backbone.depth=18 model.backbone.stem_channels=32"
    " model.backbone.base_channels=32 model.head.in_channels=256"
)


class Way(NamedTuple):
    """How commands are run: what they look like, options behind them, and whether it takes long."""

    pattern: str
    options: str = ""
    slow: bool = False


WAYS = (
    Way(r"make [\w-]+", "--dry-run"),
    Way(r"tools/dist_train\.sh configs/imagenet", "--dry-run", slow=True),
    Way(r"python tools/train_cifar\.py .*resnet20_mrla-base|.*resnet56", "--dry-run", slow=True),
    Way(r"python tools/(train|test)\.py configs/demo", "--dry-run", slow=True),
    Way(r"tools/dist_(train|test)\.sh ", "--dry-run", slow=True),
    Way(r"python tools/(train|test|train_cifar)\.py ", "--dry-run"),
    Way(r"mmrla (train|test) ", "--dry-run", slow=True),
    Way(r"mmrla predict ", slow=True),
    Way(r"mmrla (list|convert|check-env)\b"),
    Way(r"mmrla (check-data|convert-data|new-config) "),
    Way(r"mmrla check-gpu", "--device cpu --processes 0 --no-times"),
    Way(r"mmrla demo", "--epochs 1 --num-train 16 --num-val 4 --pictures 1", slow=True),
    Way(r"python tools/demo\.py ", slow=True),
    Way(r"mmrla figure cam ", f"--size 64 {SMALL}", slow=True),
    Way(r"mmrla cost memory ", "--depths 18 34", slow=True),
    Way(r"mmrla cost layout ", "--rounds 1 --batch 2 --size 32", slow=True),
    Way(r"OMP_NUM_THREADS=1 mmrla cost speed ", "--help", slow=True),
    Way(r"python tools/benchmark/kernel_report", "--heights 7 --batch 1", slow=True),
    Way(r"OMP_NUM_THREADS=1 mmrla cost compare configs", "--rounds 0", slow=True),
    Way(r"mmrla cost compare --", "--rounds 0 configs/imagenet/resnet50_dia_in1k.py", slow=True),
    Way(r"mmrla (figure|cost) ", slow=True),
    Way(r"mmrla export-onnx ", slow=True),
    Way(r"python tools/(convert|publish)_checkpoint\.py ", slow=True),
)


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Without comments and continuation lines."""
        text = self.text.replace("\\\n", " ")
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
        return [line for line in lines if line]

    def is_config(self) -> bool:
        return all(isinstance(node, ast.Assign) for node in ast.parse(self.text).body)


def blocks_of(page: Path) -> Iterator[Block]:
    """Read the fenced blocks of a page, with the comment in front of each."""
    before, fence = "", None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        opened = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if fence is None and opened:
            fence, language, start, body = opened[1], opened[2], number, []
        elif fence is not None and line.strip() == fence:
            marker = re.fullmatch(r"<!-- not run: (.*) -->", before.strip())
            yield Block(page, start, language, "\n".join(body), marker and marker[1])
            before, fence = "", None
        elif fence is not None:
            body.append(line)
        elif line.strip():
            before = line
    assert fence is None, f"{page}: a block has no end"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.not_run is None]


def way_of(command: str) -> Way | None:
    return next((way for way in WAYS if re.match(way.pattern, command)), None)


def shell_params() -> Iterator[object]:
    """The commands of each block, but for those that stood in an earlier one."""
    seen: set[str] = set()
    for block in RUN:
        commands = [c for c in block.commands() if block.language in SHELL and c not in seen]
        seen |= set(commands)
        ways = [way_of(command) for command in commands]
        slow = [pytest.mark.slow] if any(way and way.slow for way in ways) else []
        if commands:
            yield pytest.param(commands, id=block.id, marks=slow)


def test_every_block_is_known():
    unknown = [
        f"{block.id}: {command}"
        for block in RUN
        if block.language not in TEXT | {"python"}
        for command in (block.commands() if block.language in SHELL else [block.language])
        if block.language not in SHELL or way_of(command) is None
    ]
    assert not unknown, "no way to run these; add one to WAYS, or mark them <!-- not run: ... -->"
    assert {block.not_run for block in BLOCKS} - {None} <= REASONS
    for block in BLOCKS:
        if block.not_run == "installs packages":
            assert all(command.startswith("pip ") for command in block.commands()), block.id
    marked = sum(page.read_text().count("<!-- not run:") for page in PAGES)
    assert marked == sum(block.not_run is not None for block in BLOCKS), "a marker without a block"
    assert len(RUN) > 30


# Commands


def image(path: Path, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))


@pytest.fixture(scope="session")
def data(coco_mini, tmp_path_factory) -> Path:
    """What the pages call data/."""
    from mmpretrain.datasets import CIFAR10

    folder = tmp_path_factory.mktemp("docs") / "data"
    folder.mkdir()
    (folder / "coco").symlink_to(coco_mini)
    for split in ("train", "val", "test"):
        for label in range(1000):
            (folder / f"imagenet/{split}/n{label:08d}").mkdir(parents=True)
        image(folder / f"imagenet/{split}/n00000000/0.JPEG")
        for name in CIFAR10.METAINFO["classes"]:
            image(folder / f"cifar10/{split}/{name}/0.png")
        for name in ("ant", "bee", "cat"):
            image(folder / f"insects/{split}/{name}/0.jpg")
    for split in ("train", "val", "test"):
        write_voc(folder / "bccd", split, [("WBC", (4, 5, 40, 30), 0)])
        (folder / f"bccd/ImageSets/Main/{split}.txt").write_text(split)
    generate_shapes(folder / "mine", num_train=2, num_val=2)
    for path in (folder / "mine/annotations").iterdir():
        text = path.read_text().replace('"circle"', '"bolt"').replace('"square"', '"nut"')
        path.write_text(text)
    return folder


@pytest.fixture
def checkout(data, tmp_path, monkeypatch) -> Path:
    """A scratch checkout, with the data, and the config that a page tells to write."""
    for name in ("tools", "requirements", "tests", "mmrla", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for path in (ROOT / "requirements.txt", ROOT / "model-index.yml"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").iterdir():
        (tmp_path / "configs" / path.name).symlink_to(path)
    (own,) = [b for b in RUN if b.page.name == "own_data.md" and b.language == "python"]
    (tmp_path / "configs/bolts.py").write_text(own.text)
    generate_shapes(tmp_path / "work_dirs/first/data", num_train=2, num_val=2)
    for name in ("image.jpg", "cat.jpg", "dog.jpg", "photos/1.jpg", "photos/2.jpg"):
        image(tmp_path / name, 64)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(config: Path, options: list[str], plain: bool = False) -> dict[str, torch.Tensor]:
    """A state dict of a config's network, with random weights."""
    cfg = Config.fromfile(config)
    given = dict(option.split("=") for option in options)
    cfg.merge_from_dict({k: int(v) if v.isdigit() else v for k, v in given.items()})
    if plain:
        cfg.model.backbone.layer_attention = None
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).state_dict()


def make_inputs(argv: list[str], way: Way) -> None:
    """Put there the weights that a command reads."""
    if "convert" in " ".join(argv[:3]):
        if not Path(argv[-2 if argv[0] == "mmrla" else 2]).exists():
            network = MRLAResNet(50, layer_attention=dict(type="MRLALight"))
            source = argv[2]
            torch.save(to_released(network.state_dict()), source)
        return
    if "publish" in argv[1]:
        Path(argv[2]).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state_dict=weights(Path("configs/mask_rcnn_r50_mrla_1x.py"), [])), argv[2])
        return
    options = [a for a in argv if a.startswith("model.") and "=" in a]
    config = None
    for before, argument in itertools.pairwise(argv):
        if argument.startswith("configs/"):
            config = Path(argument)
        elif argument in list_configs():
            config = Path(config_path(argument))
        elif re.fullmatch(r"[A-Z]+|\S+\.pth", argument) and before not in ("--dtype",):
            Path(argument).parent.mkdir(parents=True, exist_ok=True)
            if way.options == "--dry-run":
                Path(argument).touch()
            elif config is not None:
                state = weights(config, options, plain=before == "--plain-checkpoint")
                torch.save(dict(state_dict=state), argument)


def of_a_newcomer() -> dict[str, str]:
    """The environment without what a ``make test STACK=... VENV=...`` around us hands down."""
    given = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "STACK", "VENV", "TEST_WORKERS", "PYTEST_ARGS")
    return {name: value for name, value in os.environ.items() if name not in given}


@pytest.mark.parametrize("commands", shell_params())
def test_commands(commands, checkout):
    for command in commands:
        way = way_of(command)
        argv = [*shlex.split(command), *shlex.split(way.options)]
        variables = dict(a.split("=", 1) for a in itertools.takewhile(lambda a: "=" in a, argv))
        del argv[: len(variables)]
        make_inputs(argv, way)
        env = {**of_a_newcomer(), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
               "OMP_NUM_THREADS": "1", **variables}  # fmt: skip
        if argv[0] in ("python", "mmrla"):
            start = argv[1:] if argv[0] == "python" else ["-m", *argv]
            done = run_command(*start, cwd=checkout, environ=env)
        else:
            done = subprocess.run(
                argv, cwd=checkout, capture_output=True, text=True, timeout=900, check=False,
                env=env,
            )  # fmt: skip
        # check-env says by its status whether it found something wrong with the machine.
        bad = 1 if "check-env" in command else 0
        assert done.returncode in (0, bad), f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert done.stdout.strip() or done.stderr.strip(), command


def test_diffs_are_of_the_files():
    hunks = 0
    for block in RUN:
        if block.language == "diff":
            for part in re.split(r"^\+\+\+ b/", block.text, flags=re.M)[1:]:
                path, *lines = part.splitlines()
                text = (ROOT / path).read_text()
                for hunk in "\n".join(lines).split("\n@@\n"):
                    added = "\n".join(line.removeprefix("+") for line in hunk.strip().splitlines())
                    assert added in text, f"{block.id}: not in {path}:\n{added}"
                    hunks += 1
    assert hunks > 5


# Python


PYTHON_PAGES = sorted({b.page for b in RUN if b.language == "python" and not b.is_config()})


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(page, checkout, capsys):
    """All code of a page in turn, which shares its names."""
    if page.name == "timm.md":
        pytest.importorskip("timm", reason="requirements/extras.txt is not installed")
        pytest.importorskip("segmentation_models_pytorch")
    file = Path("work_dirs/mask_rcnn_r50_mrla_1x/epoch_12.pth")
    if file.name in page.read_text():
        file.parent.mkdir(parents=True)
        state = weights(Path("configs/mask_rcnn_r50_mrla_1x.py"), [])
        torch.save(dict(state_dict=state, meta={}), file)
    scope: dict[str, object] = {}
    for block in RUN:
        if block.page == page and block.language == "python" and not block.is_config():
            exec(compile(block.text, block.id, "exec"), scope)
    printed = capsys.readouterr().out
    if page.name == "README.md":
        assert [tuple(f.shape) for f in scope["features"]] == [(2, 2048, 7, 7)]
        assert "([2, 2048, 7, 7],)" in page.read_text()
    for expected in re.findall(r"# (torch\.Size\(.*)", page.read_text()):
        assert expected in printed
    if "out_dir='outputs'" in page.read_text():
        assert cv2.imread("outputs/vis/image.jpg") is not None


CONFIGS = [b for b in RUN if b.language == "python" and b.is_config()]


@pytest.mark.parametrize("block", CONFIGS, ids=lambda b: b.id)
def test_configs_build(block, checkout):
    path = checkout / "configs/_of_a_page.py"
    path.write_text(block.text)
    cfg = Config.fromfile(path)
    if "backbone" in cfg:  # what stands inside model = dict(...)
        cfg = Config(dict(model=dict(backbone=cfg.backbone)))
    built = 0
    scope = cfg.get("default_scope") or "mmdet"
    with DefaultScope.overwrite_default_scope(scope):
        model = cfg.get("model") or {}
        if "type" in model:
            model.backbone.init_cfg = None
            network = MODELS.build(model)
            assert "mrla" in "".join(network.state_dict())
            if "num_classes=2" in block.text:
                assert network.roi_head.bbox_head.num_classes == 2
            built += 1
        else:
            for part in model.values():
                for settings in (part, part.get("backbone") or {}):
                    settings.pop("init_cfg", None)
                    settings.pop("_delete_", None)
                keys = "".join(MODELS.build(part).state_dict())
                assert "mrla" in keys or not part.get("layer_attention")
                assert "eca" in keys or not part.get("plugins")
                built += 1
        for hook in cfg.get("custom_hooks") or ():
            HOOKS.build(hook)
            built += 1
        for hook in (cfg.get("default_hooks") or {}).values():
            if hook["type"].startswith("mmrla."):
                HOOKS.build(hook)
                built += 1
        named = [(LOOPS, cfg.get("train_cfg"))]
        named += [(DATASETS, (cfg.get("train_dataloader") or {}).get("dataset"))]
        named += [(STRATEGIES, cfg.get("strategy"))]
        for registry, part in named:  # these need a runner, or data
            if part and part.get("type", "").startswith("mmrla."):
                assert registry.get(part.type) is not None, part.type
                built += 1
    assert built, "nothing in it was built"


EXAMPLES = sorted(p for p in (ROOT / "mmrla").rglob("*.py") if ">>> " in p.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_of_docstrings(path):
    """The API pages show them."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith("mmrla.timm"):
        pytest.importorskip("timm", reason="requirements/extras.txt is not installed")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed


# What pages name


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def expanded(path: str) -> list[str]:
    """Braces as a shell expands them; what stands for a name, as a glob."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if not braces:
        return [re.sub(r"<\w+>", "*", path)]
    return [p for word in braces[1].split(",") for p in
            expanded(path[: braces.start()] + word + path[braces.end() :])]  # fmt: skip


def test_every_path_is_there():
    named = re.compile(
        r"(?<![\w/.~-])(?:configs|tools|docs|requirements|tests|mmrla)/[\w./*{},<>-]*"
    )
    count = 0
    for page in PAGES:
        for written in named.findall(page.read_text()):
            for path in expanded(written.rstrip(".,:")):
                path = path.rstrip("/")
                if path in ("configs/bolts.py", "configs/cells.py"):  # the reader's
                    continue
                assert list(ROOT.glob(path)), f"{page.name} names {written}"
                count += 1
    assert count > 100


def test_every_make_target_and_variable_is_there():
    makefile = (ROOT / "Makefile").read_text()
    known = makefile + (ROOT / "tools/dist_train.sh").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"
        for variable in re.findall(r"`([A-Z_]+)=[^`\s]*`", page.read_text()):
            if not variable.startswith("MMRLA_"):
                assert re.search(rf"\b{variable}\b", known), f"{page.name}: {variable}"


def test_every_option_is_there():
    """Those in the text; blocks are run."""
    sources = [*(ROOT / "tools").rglob("*"), *(ROOT / "mmrla").rglob("*.py")]
    source = "\n".join(path.read_text() for path in sources if path.suffix in (".py", ".sh"))
    known = set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", source)) | {
        "--help",
        "--no-deps",
        "--nproc_per_node",
    }
    for page in PAGES:
        code = " ".join(re.findall(r"`([^`]+)`", prose(page)))
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in known, f"{page.name} names {option}"


def test_home_lists_every_page():
    home = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in home, page.name
    listed = (ROOT / "docs/api/README.md").read_text()
    for page in (ROOT / "docs/api").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in listed, page.name


# The site


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
    for page in site.rglob("*.html"):
        html = page.read_text()
        assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://[^>]*", html), (
            page
        )
        assert "arithmatex" not in html, page
    concepts = (site / "concepts.html").read_text()
    assert concepts.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(
        r"`[^`\n]*`", "", prose(ROOT / "docs/concepts.md")), re.S))  # fmt: skip
    assert not re.search(r"\$[\\A-Za-z(]", re.sub(r"<script.*?</script>", "", concepts, flags=re.S))


def test_site_has_the_public_names(site):
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    assert len(pages) == 12
    for page in pages:
        if page.name == "README.md":
            continue
        name = "mmrla" if page.stem == "mmrla" else f"mmrla.{page.stem}"
        if page.stem == "timm" and importlib.util.find_spec("timm") is None:
            continue
        module = importlib.import_module(name)
        ids = re.findall(r'id="(mmrla\.[\w.]+)"', (site / f"api/{page.stem}.html").read_text())
        shown = {found.rpartition(".")[2] for found in ids}
        # timm adds the names of models that are registered with it.
        public = {n for n in module.__all__ if name != "mmrla.timm" or "_mrla_" not in n}
        assert public - {"__version__"} <= shown, name


def test_search_index_has_the_pages(site):
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"README"}
    assert {"index.html", "contributing.html", *(f"{name}.html" for name in pages)} <= found
    # The texts of configs are found by their names in the tables.
    assert not [location for location in found if location.startswith("source/")]
    assert (site / "source/configs/mask_rcnn_r50_mrla_1x.py.html").is_file()

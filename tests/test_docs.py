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
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, LOOPS, STRATEGIES
from mmpretrain.datasets import CIFAR10

from mmrla import config_path, list_configs
from mmrla.checkpoints import to_released
from mmrla.datasets import generate_shapes
from mmrla.models import MRLAResNet
from tests.conftest import ROOT
from tests.datasets.bad_sets import write_image
from tests.datasets.test_voc import write_voc
from tests.helpers import build
from tests.zygote import run_command

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = {
    "installs packages", "installs git hooks", "run by tests/projects",
    "run by tests/test_names.py", "run by tests/commands/test_run.py on data of its own",
    "needs DeepSpeed and several processes",
}  # fmt: skip
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
    Way(r"python tools/train_cifar\.py .*resnet20_mrla-base|.*resnet56", "--dry-run", slow=True),
    Way(r"python tools/(train|test)\.py configs/demo|mmrla (train|test) ", "--dry-run", slow=True),
    Way(r"tools/dist_(train|test)\.sh ", "--dry-run", slow=True),
    Way(r"python tools/(train|test|train_cifar)\.py ", "--dry-run"),
    Way(r"mmrla (list|convert|check-env)\b|mmrla (check-data|convert-data|new-config) "),
    Way(r"mmrla check-gpu", "--device cpu --processes 0 --no-times"),
    Way(r"mmrla demo", "--epochs 1 --num-train 16 --num-val 4 --pictures 1", slow=True),
    Way(r"mmrla figure cam ", f"--size 64 {SMALL}", slow=True),
    Way(r"mmrla cost memory ", "--depths 18 34", slow=True),
    Way(r"mmrla cost layout ", "--rounds 1 --batch 2 --size 32", slow=True),
    Way(r"OMP_NUM_THREADS=1 mmrla cost speed ", "--help", slow=True),
    Way(r"python tools/benchmark/kernel_report", "--heights 7 --batch 1", slow=True),
    Way(r"OMP_NUM_THREADS=1 mmrla cost compare configs", "--rounds 0", slow=True),
    Way(r"mmrla cost compare --", "--rounds 0 configs/imagenet/resnet50_dia_in1k.py", slow=True),
    Way(r"mmrla (predict|export-onnx|figure|cost) |python tools/demo\.py ", slow=True),
    Way(r"python tools/(convert|publish)_checkpoint\.py ", slow=True),
)  # fmt: skip


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


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.not_run is None]
PYTHON = [block for block in RUN if block.language == "python"]
OF_PAGES = pytest.mark.parametrize("page", PAGES, ids=name_of)


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


@pytest.fixture(scope="session")
def data(coco_mini, tmp_path_factory) -> Path:
    """What the pages call data/."""
    folder = tmp_path_factory.mktemp("docs") / "data"
    folder.mkdir()
    (folder / "coco").symlink_to(coco_mini)
    for split in ("train", "val", "test"):
        for label in range(1000):
            (folder / f"imagenet/{split}/n{label:08d}").mkdir(parents=True)
        write_image(folder / f"imagenet/{split}/n00000000/0.JPEG")
        for name in CIFAR10.METAINFO["classes"]:
            write_image(folder / f"cifar10/{split}/{name}/0.png", 32, 32)
        for name in ("ant", "bee", "cat"):
            write_image(folder / f"insects/{split}/{name}/0.jpg")
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
    for name in ("tools", "requirements", "tests", "mmrla", "Makefile", "pyproject.toml",
                 "requirements.txt", "model-index.yml"):  # fmt: skip
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").iterdir():
        (tmp_path / "configs" / path.name).symlink_to(path)
    (own,) = [block for block in PYTHON if block.page.name == "own_data.md"]
    (tmp_path / "configs/bolts.py").write_text(own.text)
    generate_shapes(tmp_path / "work_dirs/first/data", num_train=2, num_val=2)
    for name in ("image.jpg", "cat.jpg", "dog.jpg", "photos/1.jpg", "photos/2.jpg"):
        write_image(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_weights(config: Path, path: str | Path, options: list[str], plain: bool = False) -> None:
    """A checkpoint of a config's network, with random weights."""
    cfg = Config.fromfile(config)
    given = dict(option.split("=") for option in options)
    cfg.merge_from_dict({k: int(v) if v.isdigit() else v for k, v in given.items()})
    if plain:
        cfg.model.backbone.layer_attention = None
    cfg.model.backbone.init_cfg = None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=build(cfg.model, cfg.default_scope).state_dict(), meta={}), path)


def make_inputs(argv: list[str], way: Way) -> None:
    """Put there the weights that a command reads."""
    if "convert" in " ".join(argv[:3]):
        if not Path(argv[-2 if argv[0] == "mmrla" else 2]).exists():
            network = MRLAResNet(50, layer_attention=dict(type="MRLALight"))
            torch.save(to_released(network.state_dict()), argv[2])
        return
    if "publish" in argv[1]:
        save_weights(Path("configs/mask_rcnn_r50_mrla_1x.py"), argv[2], [])
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
                save_weights(config, argument, options, plain=before == "--plain-checkpoint")


@pytest.mark.parametrize("commands", shell_params())
def test_commands(commands, checkout):
    # Without what a `make test STACK=... VENV=...` around us hands down.
    given = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "STACK", "VENV", "TEST_WORKERS", "PYTEST_ARGS")
    environ = {name: value for name, value in os.environ.items() if name not in given}
    for command in commands:
        way = way_of(command)
        argv = [*shlex.split(command), *shlex.split(way.options)]
        variables = dict(a.split("=", 1) for a in itertools.takewhile(lambda a: "=" in a, argv))
        del argv[: len(variables)]
        make_inputs(argv, way)
        env = {**environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
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


CODE = [block for block in PYTHON if not block.is_config()]


@pytest.mark.parametrize("page", sorted({block.page for block in CODE}), ids=name_of)
def test_code_runs(page, checkout, capsys):
    """All code of a page in turn, which shares its names."""
    if page.name == "timm.md":
        pytest.importorskip("timm", reason="requirements/extras.txt is not installed")
        pytest.importorskip("segmentation_models_pytorch")
    file = "work_dirs/mask_rcnn_r50_mrla_1x/epoch_12.pth"
    if "epoch_12.pth" in page.read_text():
        save_weights(Path("configs/mask_rcnn_r50_mrla_1x.py"), file, [])
    scope: dict[str, object] = {}
    for block in CODE:
        if block.page == page:
            exec(compile(block.text, block.id, "exec"), scope)
    printed = capsys.readouterr().out
    if page.name == "README.md":
        assert [tuple(f.shape) for f in scope["features"]] == [(2, 2048, 7, 7)]
        assert "([2, 2048, 7, 7],)" in page.read_text()
    for expected in re.findall(r"# (torch\.Size\(.*)", page.read_text()):
        assert expected in printed
    if "out_dir='outputs'" in page.read_text():
        assert cv2.imread("outputs/vis/image.jpg") is not None


@pytest.mark.parametrize("block", [b for b in PYTHON if b.is_config()], ids=lambda b: b.id)
def test_configs_build(block, checkout):
    path = checkout / "configs/_of_a_page.py"
    path.write_text(block.text)
    cfg = Config.fromfile(path)
    if "backbone" in cfg:  # what stands inside model = dict(...)
        cfg = Config(dict(model=dict(backbone=cfg.backbone)))
    scope, model = cfg.get("default_scope") or "mmdet", cfg.get("model") or {}
    whole = "type" in model
    built = []
    for part in [model] if whole else model.values():
        for settings in (part, part.get("backbone") or {}):
            settings.pop("init_cfg", None)
            settings.pop("_delete_", None)
        built.append(build(part, scope))
        keys = "".join(built[-1].state_dict())
        assert "mrla" in keys or not (whole or part.get("layer_attention"))
        assert "eca" in keys or not part.get("plugins")
        if whole and "num_classes=2" in block.text:
            assert built[-1].roi_head.bbox_head.num_classes == 2
    ours = (h for h in (cfg.get("default_hooks") or {}).values() if h["type"].startswith("mmrla."))
    built += [build(hook, scope, HOOKS) for hook in (*(cfg.get("custom_hooks") or ()), *ours)]
    dataset = (cfg.get("train_dataloader") or {}).get("dataset")
    for registry, part in (
        (LOOPS, cfg.get("train_cfg")), (DATASETS, dataset), (STRATEGIES, cfg.get("strategy")),
    ):  # fmt: skip
        if part and part.get("type", "").startswith("mmrla."):
            built.append(registry.get(part.type))  # which needs a runner, or data
    assert built, "nothing in it was built"
    assert None not in built


EXAMPLES = sorted(p for p in (ROOT / "mmrla").rglob("*.py") if ">>> " in p.read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=name_of)
def test_examples_of_docstrings(path):
    """The API pages show them."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith("mmrla.timm"):
        pytest.importorskip("timm", reason="requirements/extras.txt is not installed")
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed

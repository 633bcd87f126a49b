"""mmrla cost speed and compare: what they measure is what they say."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrla import ops
from mmrla.analysis.complexity import kept_for_backward
from mmrla.analysis.pages import markdown, replace_part
from mmrla.analysis.published import PUBLISHED
from mmrla.commands import cost
from mmrla.commands import cost_speed as speed
from mmrla.commands import cost_tables as tables
from mmrla.commands import cost_targets as targets
from mmrla.commands.timing import ratio, side_by_side
from mmrla.engine.inspection import write_csv
from mmrla.ops.dispatch import ENV_VAR, Op
from tests.conftest import ROOT

CPU = torch.device("cpu")


def test_ratios_of_known_steps():
    calls: list[str] = []

    def step(name: str, seconds: float):
        def run():
            calls.append(name)
            end = time.process_time() + seconds  # what counts on one thread
            while time.process_time() < end:
                pass

        return run

    steps = {"a": step("a", 0.02), "b": step("b", 0.04)}
    seconds = side_by_side(steps, 4, CPU, warm_up=1)
    assert calls == [*"ab", *"ab", *"ba", *"ab", *"ba"]  # warm-up, then turning order
    assert 1.5 < ratio(seconds, "b", "a") < 2.5


def test_kept_memory_of_a_known_graph():
    """relu keeps its output, the product both factors; the parameter and its cast do not count."""
    linear = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)

    def forward():
        y = linear(x).relu()
        return (y * y.detach().exp()).sum()

    # x, relu's output (also the product's factor), exp's output
    assert kept_for_backward(linear, forward) == 3 * 4 * 8 * 4
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_for_backward(linear, lambda: linear(x).relu()) == 2 * 4 * 8 * 2


def test_each_variant_runs_its_own_backend(monkeypatch):
    chosen = []
    select = Op.select

    def spy(self, *args, **kwargs):
        selection = select(self, *args, **kwargs)
        if self in (ops.mrla_light_tail, ops.mrla_base_tail):
            chosen.append((self, selection.backend.name))
        return selection

    monkeypatch.setattr(Op, "select", spy)
    monkeypatch.setenv(ENV_VAR, "of the caller")
    for name in speed.VARIANTS[1:]:
        variant = speed.variant(speed.Case("ResNet-20", 2, 8, "float32-nchw"), name, CPU)
        variant.train_step()
        variant.infer()
        attention, _, forced = name.partition(" ")
        op = {"light": ops.mrla_light_tail, "base": ops.mrla_base_tail}[attention]
        assert set(chosen) == {(op, forced or "fused")}, name
        chosen.clear()
    assert os.environ[ENV_VAR] == "of the caller"


@pytest.mark.parametrize("mode", ["float32-nchw", "bfloat16-channels_last"])
def test_memory_meets_its_targets(mode):
    """The targets that no other load of the machine changes."""
    case = speed.Case("ResNet-50", 1, 64, mode)
    kept = {name: speed.kept(speed.variant(case, name, CPU)) for name in speed.VARIANTS}
    bounds = {
        target.variant: target.bound
        for target in targets.TARGETS
        if target.column == "kept over plain"
    }
    assert bounds == {"light": 1.35, "base": 1.60}
    for name, bound in bounds.items():
        assert kept[name] / kept["plain"] <= bound
        assert kept[f"{name} naive"] / kept["plain"] > bound


def test_cases_and_modes(monkeypatch):
    monkeypatch.setattr(speed, "has_fast_bfloat16", lambda: False)
    cases = [speed.Case("ResNet-20", 2, 8, m) for m in ("float32-nchw", "bfloat16-channels_last")]
    rows = speed.measure(CPU, 1, cases=cases)
    assert [row["variant"] for row in rows] == [*speed.VARIANTS] * 2
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    for row in rows:
        assert (row["train over plain"] == 1) == (row["variant"] == "plain")
        assert bool(row["train over naive"]) == (row["variant"] in ("light", "base"))
        assert row["inference over plain"] is None
        assert ("no bfloat16" in row["remark"]) == row["mode"].startswith("bfloat16")
    rows = speed.measure(CPU, 1, modes=["bfloat16-channels_last"], cases=cases)
    assert {row["mode"] for row in rows} == {"bfloat16-channels_last"}
    assert speed.measure(CPU, 1, modes=["bfloat16-nchw"], cases=cases) == []
    # What the targets ask for is measured.
    for listed, cases in ((targets.TARGETS, speed.CPU_CASES),
                        (targets.GPU_TARGETS, speed.GPU_CASES)):  # fmt: skip
        for target in listed:
            assert any(
                target.network in (None, case.network)
                and target.mode in (None, case.mode)
                and target.batch in (None, case.batch)
                for case in cases
            ), target


def test_columns_of_compiled_variants_and_kernels(monkeypatch):
    cuda = torch.device("cuda")
    large, _, small, deep = speed.GPU_CASES
    names = speed._names(small, cuda, True)
    assert names[5:] == [f"{a} {how}" for a in ("plain", "light", "base")
                         for how in ("compiled", "reduce-overhead")]  # fmt: skip
    assert "light reduce-overhead" not in speed._names(large, cuda, True)
    assert speed._names(deep, cuda, True) == [*speed.VARIANTS]
    cost = {name: len(names) + i for i, name in enumerate(names)}
    monkeypatch.setattr(speed, "side_by_side", lambda *_: {n: [c] * 2 for n, c in cost.items()})
    monkeypatch.setattr(speed, "device_work", lambda step, _: (1e-3 * cost[step], cost[step]))
    variants = {name: SimpleNamespace(train_step=name, infer=None, device=cuda) for name in names}
    rows = speed.timed("train", variants, 2)
    assert len({tuple(row) for row in rows.values()}) == 1
    for name, plain in (("light", "plain"), ("base compiled", "plain compiled")):
        expected = cost[name] / cost[plain]
        assert rows[name]["train over plain"] == pytest.approx(expected, abs=1e-3)
        assert rows[name]["train kernels over plain"] == pytest.approx(expected, abs=1e-3)
        assert rows[name]["train launches"] == cost[name]
    assert rows["light"]["train over naive"] < 1
    assert rows["base compiled"]["train over naive"] is None
    expected = cost["base compiled"] / cost["base"]
    assert rows["base compiled"]["train over eager"] == pytest.approx(expected, abs=1e-3)


def test_targets_say_the_worst_and_what_was_not_measured(tmp_path):
    rows = [
        {"network": "ResNet-50", "batch": 2, "mode": mode, "variant": variant,
         "train over plain": 1.3, "inference over plain": None, "train over naive": over,
         "kept over plain": kept, "remark": "odd" if over == 1.1 else ""}
        for mode, over in (("float32-nchw", 0.9), ("bfloat16-channels_last", 1.1))
        for variant, kept in (("plain", 1.0), ("light naive", 1.8), ("light", 1.3))
    ]  # fmt: skip
    found = {(row["target"], row["on"]): row for row in targets.targets(rows, CPU)}
    assert found["ResNet-50, every mode: light, kept over plain", "cpu"]["met"] == "yes"
    worst = found["every network, every mode: light, train over naive", "cpu"]
    assert (worst["measured"], worst["met"], worst["remark"]) == (1.1, "no", "odd")
    assert worst["worst row"] == "ResNet-50, bfloat16-channels_last"
    unknown = found["ResNet-50, float32-nchw: light, inference over plain", "cpu"]
    assert (unknown["measured"], unknown["met"]) == ("not measured", "")
    gpu = found["ResNet-50, bfloat16-nchw, batch 256: base, inference over plain", "cuda"]
    assert (gpu["measured"], gpu["before"], gpu["must reach"]) == (
        "not measured",
        "2.28",
        "<= 1.15",
    )
    scaling = [
        {"depth": depth, "variant": variant, "train over plain": 1.0, "kept over plain": 1.0}
        for depth in (50, 101)
        for variant in ("plain", "light")
    ]
    for path in targets.draw(dict(models=rows, scaling=scaling), tmp_path, "a machine"):
        assert path.stat().st_size > 5000
    path = cost.save_rows("models", rows, tmp_path, CPU)
    assert path.name.startswith("models_cpu")
    assert f"torch{torch.__version__.split('+')[0]}" in path.name
    assert path.read_text().splitlines()[0] == ",".join(rows[0])


def test_rows_with_other_keys(tmp_path):
    rows = [dict(a=1, c=2), dict(a=3, b=4, c=5)]
    titles, _, first, second = markdown(rows).splitlines()
    assert (titles, first, second) == ("| a | c | b |", "| 1 | 2 |  |", "| 3 | 5 | 4 |")
    path = write_csv(tmp_path / "rows.csv", rows)
    assert path.read_text().split() == ["a,c,b", "1,2,", "3,5,4"]


@pytest.mark.slow
def test_depth_and_detector():
    rows = speed.measure_scaling(CPU, 1, True)
    assert {row["depth"] for row in rows} == {50, 101}
    rows = speed.measure_detector(CPU, 1)
    assert [row["variant"] for row in rows] == [*speed.VARIANTS]
    assert speed.measure_detector(CPU, 1, ["bfloat16-nchw"]) == []


def test_compare_covers_every_resnet50():
    names = [tables.name_of(path) for path in tables.compared_configs()]
    assert names[0] == "plain"
    assert {"dia", "rla-g", "dla", "dla-base", "mrla", "mrla-base", "densenet161"} <= set(names)
    assert len(names) == len(set(names))
    ablation = Path("configs/ablation/resnet50_eca_drop-path_in1k.py")
    assert tables.name_of(ablation) == "eca_drop-path"


def test_compare_tells_differences_and_reasons():
    assert tables.difference("dia", 28_358_052, 10**9) == ""
    assert tables.difference("se", 28_088_000, 4_120_000_000) == ""
    told = tables.difference("se", 29_100_000, 4_120_000_000)
    assert told == "params +3.6%: not explained yet"
    assert tables.difference("unknown", 1, 1) == ""
    assert tables.difference("densenet161", 28_681_000, 7_790_000_000) == ""
    told = tables.difference("a2", 32_907_000, 6_681_000_000)
    assert re.fullmatch(r"params -4.9%: .*2\^20.*; GFLOPs -4.6%: .*within_layer.md.*", told)
    assert tables.difference("mrla", 25_738_000, 4_178_000_000) == ""
    told = tables.difference("rla-g", params := 25_870_696, macs := 4_477_868_576)
    assert (
        told == "params +4.9%: published in units of 2^20; GFLOPs +7.4%: published in units of 2^30"
    )
    stated = PUBLISHED["rla-g"]
    assert (f"{params / 2**20:.2f}", f"{macs / 2**30:.2f}") == (stated.params, stated.gflops)


def test_compare_measures_and_writes(tmp_path):
    folder = ROOT / "configs/imagenet"
    paths = [folder / f"resnet50_{name}_in1k.py" for name in ("plain", "rla-g")]
    plain, rla = tables.compare(paths, CPU, 1, 2, 224, 32)
    assert (plain["params, M"], plain["GFLOPs"], plain["kept over plain"]) == (
        "25.56",
        "4.11",
        "1.00",
    )
    assert rla["params, M"] == "25.87"
    assert float(rla["kept over plain"]) > 1.1
    assert float(rla["training step over plain"]) > 0
    assert float(rla["inference over plain"]) > 0
    assert "](../configs/imagenet/resnet50_rla-g_in1k.py)" in rla["config"]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compare:begin -->\nold\n<!-- compare:end -->\nafter\n")
    replace_part(page, "compare", "new")
    assert page.read_text() == "before\n<!-- compare:begin -->\nnew\n<!-- compare:end -->\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="page.md has no <!-- compare:begin -->"):
        replace_part(page, "compare", "new")

"""tools/benchmark: what it measures is what it says."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, which is a folder of scripts."""
    sys.path.insert(0, str(ROOT / "tools/benchmark"))
    try:
        import common
        import models
        import ops
        import run

        yield dict(common=common, models=models, ops=ops, run=run)
    finally:
        sys.path.remove(str(ROOT / "tools/benchmark"))
        for name in ("common", "models", "ops", "run"):
            sys.modules.pop(name, None)


def test_ratios_of_known_steps(bench):
    common = bench["common"]
    calls: list[str] = []

    def step(name: str, seconds: float):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    steps = {"a": step("a", 0.02), "b": step("b", 0.04)}
    seconds = common.side_by_side(steps, 4, CPU, warm_up=1)
    assert calls == [*"ab", *"ab", *"ba", *"ab", *"ba"]  # warm-up, then turning order
    assert 1.5 < common.ratio(seconds, "b", "a") < 2.5


def test_kept_memory_of_a_known_graph(bench):
    """relu keeps its output, the product both factors; the parameter does not count."""
    linear = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)

    def forward():
        y = linear(x).relu()
        return (y * y.detach().exp()).sum()

    # x, relu's output (also the product's factor), exp's output
    assert bench["common"].kept_for_backward(linear, forward) == 3 * 4 * 8 * 4


def test_peak_memory_sees_what_is_freed_again(bench):
    def step():
        torch.zeros(2**24).add_(1)  # 64 MiB, gone afterwards

    peak = bench["common"].peak_memory(step, CPU)
    if peak is None:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert 60 * 2**20 < peak < 140 * 2**20
    # Freed by Python, still resident: 32 KiB pieces stay in the heap, pinned by what came after.
    pieces = [torch.ones(2**13) for _ in range(8000)]
    pins = [bytearray(300) for _ in range(2000)]
    del pieces
    assert 60 * 2**20 < bench["common"].peak_memory(step, CPU) < 140 * 2**20
    del pins


def test_backends_are_forced_and_put_back(bench, monkeypatch):
    common = bench["common"]
    from mmrla.layers import MRLALight
    from mmrla.ops import mrla_light

    layer, x = MRLALight(64), torch.randn(1, 64, 4, 4)
    args = (x, x, layer.query.weight, layer.key.weight, layer.value.weight, layer.lambda_t, 32)
    monkeypatch.delenv(common.ENV_VAR, raising=False)
    default = mrla_light.select(*args).backend.name
    for name in ("naive", "fused"):
        with common.backend(name):
            assert mrla_light.select(*args).backend.name == name
    assert mrla_light.select(*args).backend.name == default


def test_bars_say_what_was_not_measured(bench, tmp_path):
    run = bench["run"]
    rows = [
        {"network": "ResNet-50", "variant": variant, "over plain": 1.1, "kept over plain": kept,
         "forward over plain": 1.0}
        for variant, kept in (("plain", 1.0), ("light naive", 1.8), ("light fused", 1.2))
    ]  # fmt: skip
    found = {(row["bar"], row["on"]): row for row in run.bars(rows, CPU)}
    assert found["ResNet-50 + light, kept over plain", "cpu"]["met"] == "no"
    assert found["ResNet-50 + light, over plain", "cpu"]["met"] == "yes"
    assert found["ResNet-101 + base, over plain", "cpu"]["measured"] == "not measured"
    assert found["ResNet-50 + light, over plain", "cuda"]["measured"] == "not measured"
    scaling = [
        {"depth": depth, "variant": variant, "over plain": 1.0, "kept over plain": 1.0}
        for depth in (50, 101)
        for variant in ("plain", "light fused")
    ]
    for path in run.draw(dict(models=rows, scaling=scaling), tmp_path, "a machine"):
        assert path.stat().st_size > 5000
    path = bench["common"].save("models", rows, tmp_path, CPU)
    assert path.name.startswith("models_cpu")
    assert f"torch{torch.__version__.split('+')[0]}" in path.name
    assert path.read_text().splitlines()[0] == ",".join(rows[0])


def test_operations_are_timed_on_both_backends(bench):
    rows = bench["ops"].measure(CPU, rounds=1, quick=True)
    assert {row["backend"] for row in rows} == {"naive", "fused"}
    assert all(row["forward_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_networks_are_measured(bench):
    """The memory bars, which no other load of the machine changes."""
    rows = {row["variant"]: row for row in bench["models"].measure(CPU, 1, True, False)}
    assert rows["light fused"]["kept over plain"] <= 1.08
    assert rows["base fused"]["kept over plain"] <= 1.35
    assert rows["light naive"]["kept over plain"] > 1.5


@pytest.mark.slow
def test_depth_and_detector(bench):
    rows = bench["models"].measure_scaling(CPU, 1, True)
    assert {row["depth"] for row in rows} == {50, 101}
    rows = bench["models"].measure_detector(CPU, 1, True)
    assert rows[0]["variant"] == "plain"


@pytest.fixture(scope="module")
def compare(bench):
    sys.path.insert(0, str(ROOT / "tools/benchmark"))
    try:
        import compare as module

        yield module
    finally:
        sys.path.remove(str(ROOT / "tools/benchmark"))
        sys.modules.pop("compare", None)


def test_compare_covers_every_resnet50(compare):
    names = [compare.name_of(path) for path in compare.default_configs()]
    assert names[0] == "plain"
    assert {"dia", "rla-g", "dla", "dla-base", "mrla", "mrla-base", "densenet161"} <= set(names)
    assert len(names) == len(set(names))
    ablation = Path("configs/ablation/resnet50_eca_drop-path_in1k.py")
    assert compare.name_of(ablation) == "eca_drop-path"


def test_compare_tells_differences_and_reasons(compare):
    assert compare.difference("dia", 28_358_052, 10**9) == ""
    assert compare.difference("se", 28_088_000, 4_120_000_000) == ""
    told = compare.difference("se", 29_100_000, 4_120_000_000)
    assert told == "params +3.6%: not explained yet"
    assert compare.difference("unknown", 1, 1) == ""
    assert compare.difference("densenet161", 28_681_000, 7_790_000_000) == ""
    told = compare.difference("a2", 32_907_000, 6_681_000_000)
    assert re.fullmatch(r"params -4.9%: .*2\^20.*; GFLOPs -4.6%: .*within_layer.md.*", told)


def test_compare_measures_and_writes(compare, tmp_path):
    folder = ROOT / "configs/imagenet"
    paths = [folder / f"resnet50_{name}_in1k.py" for name in ("plain", "rla-g")]
    plain, rla = compare.compare(paths, CPU, 1, 2, 224, 32)
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
    page.write_text(f"before\n{compare.BEGIN}\nold\n{compare.END}\nafter\n")
    compare.write("new", page)
    assert page.read_text() == f"before\n{compare.BEGIN}\nnew\n{compare.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="page.md has no <!-- compare:begin -->"):
        compare.write("new", page)

"""How kernels cut maps: everything is covered once, within a grid's limits."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from mmrla.ops.blocks import plan_for, small_batch

SHAPES = [
    (256, 256, 56, 56), (8, 2048, 7, 7), (1, 1, 1, 1), (3, 100, 13, 17), (2, 256, 200, 304),
    (2, 2048, 25, 38), (128, 16, 32, 32), (1, 12, 1, 3000), (5000, 3, 2, 1), (1, 200000, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("sms", [132, 16])
def test_plan_covers_the_map(shape: tuple[int, int, int, int], last: bool, sms: int) -> None:
    B, C, H, W = shape
    plan = plan_for(*shape, last, sms)
    assert plan.chunks * plan.chunk >= plan.flat.blocks > (plan.chunks - 1) * plan.chunk
    assert plan.flat.blocks * plan.flat.options["BP"] >= H * W
    for walk in (plan.walk, plan.short_walk, plan.ring_walk):
        _, lines, steps, tiles, programs, groups, all_groups, strips, length = walk.sizes
        options = walk.options
        assert sorted((lines, steps)) == sorted((H, W))
        assert groups * options["LINES"] >= lines > (groups - 1) * options["LINES"]
        assert strips * length >= steps > (strips - 1) * length
        assert all_groups == B * groups
        assert tiles >= programs == walk.grid[0] >= 1
        assert tiles * options["GROUPS"] >= all_groups * strips
        assert walk.grid[1] * options["BC"] >= C
        assert strips == 1 or options["STRIPS"]
        if options["EXACT"]:
            assert lines % options["LINES"] == all_groups % options["GROUPS"] == 0
            assert C % options["BC"] == 0
    for grid in (plan.flat.grid, plan.chunk_grid, plan.walk.grid, plan.ring_walk.grid):
        assert grid[0] < 2**31
        assert grid[1] <= 65535


@pytest.mark.parametrize("last", [True, False])
def test_small_batch_has_the_same_variants(last: bool) -> None:
    shape = (256, 256, 56, 56)
    batch = small_batch(shape, last, 132)
    assert 2 <= batch <= 32
    small, large = plan_for(batch, *shape[1:], last, 132), plan_for(*shape, last, 132)
    assert small.walk.options == large.walk.options
    assert small.ring_walk.options == large.ring_walk.options

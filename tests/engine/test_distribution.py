"""Several processes compute what one does, and die together."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.zygote import Zygote

CASES = Path(__file__).with_name("distribution_cases.py")


ALL = ("frozen_norms", "sync_norms", "checkpointing", "accumulation")


def together(zygote: Zygote, folder: Path, world: int, *cases: str, **env: str) -> str:
    """Run cases in ``world`` processes; what the first one prints."""
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    env |= dict(WORLD_SIZE=str(world), STORE=str(folder / "store"))
    pids = [
        zygote.start(CASES, *cases, log=log, RANK=str(rank), **env) for rank, log in enumerate(logs)
    ]
    status = [zygote.wait(pid) for pid in pids]
    said = [log.read_text() for log in logs]
    assert status == [0] * world, "\n".join(text[-3000:] for text in said)
    for case in cases:
        assert all(f"{case}: passed" in text for text in said)
    return said[0]


def test_two_processes_are_one_with_twice_the_batch(zygote, tmp_path):
    """Gradients with frozen norms and SyncBN, recomputation, accumulation."""
    together(zygote, tmp_path, 2, *ALL)


def test_no_parameter_stays_unused(zygote, tmp_path):
    """One process: DDP looks for parameters without a gradient in each."""
    assert "combinations" in together(zygote, tmp_path, 1, "unused")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_host_and_kind(world, zygote, tmp_path):
    together(zygote, tmp_path, world, *ALL, EVERY="1")


@pytest.mark.slow
def test_no_parameter_of_any_combination_stays_unused(zygote, tmp_path):
    print(together(zygote, tmp_path, 2, "unused", EVERY="1"))

"""Every bad file, tried: one clear error."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer
from mmengine.model import ExponentialMovingAverage

from mmrla.checkpoints import load_file, state_dict_of
from mmrla.checkpoints.files import CheckpointError
from tests.helpers import refusal
from tests.test_safety import Reduced

STATE = {"conv1.weight": torch.arange(4096.0), "bn1.bias": torch.zeros(3)}


def saved(value, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


GOOD = saved(STATE)
BAD = {
    "empty": (b"", "the file is empty"),
    "truncated": (GOOD[: len(GOOD) // 2], "truncated or damaged"),
    "html": (b"\n<!DOCTYPE html><html><body>404 Not Found", "this is a web page"),
    "xml": (b"<?xml version='1.0'?><Error>NoSuchKey</Error>", "this is a web page"),
    "text": (b"hello, I am no checkpoint at all, but long enough", "not a torch checkpoint"),
    "json": (b'{"state_dict": {}}', "not a torch checkpoint"),
    "pickle": (pickle.dumps({"a": 1}), None),
    "code": (
        saved({"state_dict": STATE, "x": Reduced(print, ("code ran",))}),
        "MMRLA_UNSAFE_LOAD=1",
    ),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_any_damage_is_one_error(legacy, tmp_path):
    """Cut off at many places and with flipped bytes: never another exception."""
    whole = saved({"state_dict": STATE}, _use_new_zipfile_serialization=not legacy)
    path = tmp_path / "damaged.pth"
    for step in range(1, 40):
        cut = len(whole) * step // 40
        for content in (whole[:cut], whole[:cut] + b"\xff\x00" + whole[cut + 2 :]):
            path.write_bytes(content)
            with contextlib.suppress(CheckpointError):
                state_dict_of(load_file(path))


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MMRLA_UNSAFE_LOAD", raising=False)
    content, message = BAD[kind]
    path = tmp_path / f"{kind}.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        state_dict_of(load_file(path))
    if message:
        assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such checkpoint: {tmp_path}/x.pth"):
        load_file(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="torchvision has no weights of that name"):
        load_file("torchvision://resnet51")


def test_opting_in_runs_what_is_in_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "code.pth"
    path.write_bytes(BAD["code"][0])
    monkeypatch.setenv("MMRLA_UNSAFE_LOAD", "1")
    state = state_dict_of(load_file(path))
    assert torch.equal(state["conv1.weight"], STATE["conv1.weight"])
    assert "code ran" in capsys.readouterr().out


@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_prefixes(legacy, tmp_path):
    path = tmp_path / "good.pth"
    timm_average = {f"module.{k}": v + 1 for k, v in STATE.items()}
    file = {
        "epoch": 3,
        "state_dict": {f"module.{k}": v for k, v in STATE.items()},
        "state_dict_ema": timm_average,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    path.write_bytes(saved(file, _use_new_zipfile_serialization=not legacy))
    state = state_dict_of(load_file(path))
    assert list(state) == list(STATE)
    assert torch.equal(state["conv1.weight"], STATE["conv1.weight"])
    averaged = state_dict_of(load_file(path), "averaged")
    assert torch.equal(averaged["conv1.weight"], STATE["conv1.weight"] + 1)
    with pytest.raises(ValueError, match="weights must be 'default', 'averaged' or 'raw', got 'b"):
        state_dict_of(load_file(path), "best")


def test_mmengine_saves_the_average_as_state_dict():
    """Taken from its hook: what it calls ema_state_dict holds the optimizer's weights."""
    model = torch.nn.Linear(2, 1, bias=False)
    hook = EMAHook()
    hook.src_model, hook.ema_model = model, ExponentialMovingAverage(model)
    torch.nn.init.constant_(model.weight, 1.0)
    torch.nn.init.constant_(hook.ema_model.module.weight, 5.0)
    checkpoint = {"state_dict": {k: v.clone() for k, v in model.state_dict().items()}}
    hook.enabled_by_epoch, hook.begin_iter, hook.begin_epoch = False, 0, 0
    hook.before_save_checkpoint(SimpleNamespace(iter=10, epoch=1), checkpoint)
    for which, value in (("averaged", 5.0), ("default", 5.0), ("raw", 1.0)):
        assert state_dict_of(checkpoint, which)["weight"].unique().tolist() == [value]


def test_mmengines_training_checkpoint_needs_no_opt_in(tmp_path):
    """Log histories are numpy arrays in a class of mmengine's: harmless, and allowed by name."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    schedulers = [{"milestones": Counter({8: 1, 11: 1})}]
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {"best": np.float64(0.5)}}
    path = tmp_path / "epoch_1.pth"
    whole = {"state_dict": STATE, "message_hub": hub, "param_schedulers": schedulers}
    path.write_bytes(saved(whole))
    assert list(state_dict_of(load_file(path))) == list(STATE)


@pytest.mark.parametrize("command", ["convert", "publish"])
def test_commands_report_bad_files_in_one_line(command, tmp_path, capsys):
    path = tmp_path / "page.pth"
    path.write_bytes(BAD["html"][0])
    line, hint = refusal(capsys, command, path, tmp_path / "out.pth").splitlines()
    assert hint == "(MMRLA_TRACEBACK=1 shows the traceback)"
    assert line.startswith("error: ")
    assert "this is a web page" in line
    assert list(tmp_path.iterdir()) == [path]

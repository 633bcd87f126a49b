"""NonFiniteGuardHook: stops before anything bad reaches a weight or a file, and says where."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import tests.networks
from mmrla.engine import NonFiniteError, NonFiniteGuardHook, init_cpu_distributed
from tests.conftest import ROOT
from tests.networks import samples
from tests.zygote import run_ranks

NAN, INF = float("nan"), float("inf")


class Classifier(tests.networks.Classifier):
    """``break_loss``: a loss of 0 whose gradient is infinite, at that iteration."""

    def __init__(self, break_loss: int = -1) -> None:
        super().__init__(drop_path_rate=0.5)
        self.break_loss = break_loss
        self.seen = 0

    def forward(self, inputs, data_samples=None, mode="loss"):
        losses = super().forward(inputs, data_samples, mode)
        if self.training and self.break_loss == self.seen:
            losses["loss"] += (self.backbone.conv1.weight[0, 0] * 0).abs().sum().sqrt()
        self.seen += 1
        return losses


def images(bad: int | None = None, value: float = NAN):
    found = samples()
    if bad is not None:
        found[bad]["inputs"][1, 4, 5] = value
    return found


def run(folder, model, dataset, guard=True, launcher="none", **wrapper):
    sampler = None
    if launcher != "none":
        rank = int(os.environ["RANK"])
        sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False)
    distributed = Config(dict(launcher=launcher))
    init_cpu_distributed(distributed)
    runner = Runner(
        model, str(folder),
        train_dataloader=DataLoader(dataset, 2, sampler=sampler, collate_fn=pseudo_collate),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01), **wrapper),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1)),
        custom_hooks=[dict(type="mmrla.NonFiniteGuardHook")] if guard else [], cfg=distributed,
        experiment_name=os.path.basename(folder), launcher=launcher, log_level="ERROR",
        randomness=dict(seed=0),
    )  # fmt: skip
    runner.train()


def state_of(path):
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_image_is_named_and_nothing_bad_is_left(tmp_path, value):
    torch.manual_seed(0)
    model = Classifier()
    wanted = "image 1 of the batch .images/5.jpg. holds .*, which the first layer 'backbone.conv1'"
    with pytest.raises(NonFiniteError, match=f"iteration 3: gradients are not finite.*{wanted}"):
        run(tmp_path, model, images(bad=5, value=value))
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["iter_1.pth", "iter_2.pth"]
    for path in tmp_path.glob("*.pth"):
        assert all(v.isfinite().all() for v in state_of(path).values() if v.is_floating_point())
    saved = state_of(tmp_path / "iter_2.pth")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name  # the bad step was not taken


def test_without_the_hook_bad_weights_would_be_saved(tmp_path):
    run(tmp_path, Classifier(), images(bad=5), guard=False)
    assert not state_of(tmp_path / "iter_4.pth")["backbone.conv1.weight"].isfinite().all()


def test_the_first_layer_is_named(tmp_path):
    model = Classifier()
    with torch.no_grad():
        model.backbone.layer2[0].conv2.weight.fill_(3e38)  # finite, and its output overflows
    with pytest.raises(NonFiniteError, match=r"'backbone.layer2.0.conv2' \(Conv2d\).*is finite"):
        run(tmp_path, model, images())
    assert not list(tmp_path.glob("*.pth"))


def test_a_gradient_alone_is_named(tmp_path):
    wanted = (
        "iteration 2: gradients are not finite .of 1 parameters, 'backbone.conv1.weight' nearest "
        "to the loss.*all outputs of layers are finite"
    )
    with pytest.raises(NonFiniteError, match=wanted):
        run(tmp_path, Classifier(break_loss=1), images())
    assert [p.name for p in tmp_path.glob("*.pth")] == ["iter_1.pth"]


def test_bad_weights_and_buffers_are_refused(tmp_path):
    model = Classifier()
    model.backbone.bn1.weight.data[3] = INF
    with pytest.raises(NonFiniteError, match="before training is not finite in 'backbone.bn1.wei"):
        run(tmp_path / "a", model, images())
    state = {**Classifier().state_dict(), "buffer": torch.tensor([NAN])}
    with pytest.raises(NonFiniteError, match="iteration 7, no checkpoint saved.*'buffer'"):
        NonFiniteGuardHook().before_save_checkpoint(SimpleNamespace(iter=7), dict(state_dict=state))
    with pytest.raises(ValueError, match="min_loss_scale must be positive, got 0"):
        NonFiniteGuardHook(min_loss_scale=0)


def test_a_good_run_is_the_same_with_it(tmp_path):
    """Drop path draws random numbers: the hook takes none. Accumulated gradients too."""
    for count in (1, 2):
        states = []
        for guard in (True, False):
            torch.manual_seed(0)
            run(tmp_path / f"{guard}{count}", model := Classifier(), images(), guard=guard,
                accumulative_counts=count)  # fmt: skip
            states.append(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_a_loss_scale_that_keeps_falling_and_a_bad_loss():
    """Of a GPU's scaler, which mmengine wants a GPU for, so that one stands for it."""

    def after(scale: float, loss: float = 1.0) -> None:
        scaler = SimpleNamespace(get_scale=lambda: scale)
        wrapper = SimpleNamespace(loss_scaler=scaler)
        runner = SimpleNamespace(iter=4, optim_wrapper=wrapper, model=Classifier())
        NonFiniteGuardHook().after_train_iter(runner, 0, None, dict(loss=torch.tensor(loss)))

    after(2.0)
    with pytest.raises(NonFiniteError, match="iteration 5: the loss scale fell to 3.05176e-05"):
        after(2.0**-15)
    with pytest.raises(NonFiniteError, match=r"iteration 5: the loss is not finite \(loss\)"):
        after(2.0, NAN)


class Deaf(torch.optim.SGD):
    """Calls no hooks, as torch 2.1's optimizers once torch.compile has been used."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad

    step.hooked = True


def watched(optimizer):
    """A hook that watches the steps of an optimizer."""
    hook, wrapper = NonFiniteGuardHook(), OptimWrapper(optimizer)
    hook.before_train(SimpleNamespace(model=nn.Linear(2, 2), optim_wrapper=wrapper, iter=0))
    return hook


def test_an_optimizer_that_calls_no_hooks():
    weight = nn.Parameter(torch.ones(3))
    optimizer = Deaf([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    hook = watched(optimizer)
    weight.grad = torch.tensor([1.0, NAN, 1.0])
    with pytest.raises(NonFiniteError, match="iteration 1: gradients are not finite"):
        optimizer.step()
    assert weight.tolist() == [1, 1, 1]
    weight.grad = torch.ones(3)
    optimizer.step()
    schedule.step()
    hook.after_train(None)
    weight.grad[0] = NAN
    optimizer.step()
    assert weight.isnan().tolist() == [True, False, False]
    torch.testing.assert_close(weight[1:].detach(), torch.full((2,), 1 - 0.1 - 0.05))


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="torch scales on GPUs alone")
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_are_no_errors(fused):
    """A fused optimizer is stepped all the same and leaves the weights as they are itself."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    watched(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, scale in ((INF, 2.0), (1.0, 2.0)):
        scaler.scale((weight * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == scale
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_all_processes_stop_together(tmp_path):
    module = "tests.engine.test_finite_check"
    run_ranks(2, "-m", module, tmp_path, folder=tmp_path, cwd=ROOT)
    said = [(tmp_path / f"said_{rank}.txt").read_text() for rank in (0, 1)]
    assert all("iteration 2: gradients are not finite" in text for text in said), said
    assert "process 1 of the batch (images/5.jpg) holds 1 NaN" in said[1]
    assert not list(tmp_path.glob("iter_2.pth"))


if __name__ == "__main__":  # one of two processes
    folder, said = Path(sys.argv[1]), "trained"
    try:
        # DistributedSampler gives image 5 to process 1 in iteration 2.
        run(folder, Classifier(), images(bad=5), launcher="pytorch")
    except NonFiniteError as error:
        said = str(error)
    (folder / f"said_{os.environ['RANK']}.txt").write_text(said)

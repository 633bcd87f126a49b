"""The interface between a host network and a layer attention."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmrla.layers.checks import check_count

PLACEMENTS: dict[str, str] = {
    "after": "after a layer",
    "branch": "on the residual branch, before the addition",
    "input": "at the input of a layer's first convolution and on its residual branch",
    "output": "at a layer's output, which it replaces",
    "sublayer": "after each sub-layer of a transformer, in place of the residual stream",
}
"""Possible values of a layer attention's ``placement``.

``after``: ``x`` is the layer's output, and the host adds ``drop_path(norm(o))`` to it. ``branch``:
``x`` is the residual branch after its last norm, and ``o`` replaces it. ``input``: as ``branch``,
and :meth:`LayerAttention.at_input` adds to the layer's first convolution. ``output``: as ``after``,
but ``o`` replaces ``x``. ``sublayer``: ``x`` is the output of an attention or an MLP, without the
addition, ``shortcut`` its input before the norm, and ``o`` the input of the next one; all are
tokens ``[B, N, C]``. A type with one of the last two placements may take ``index``, its number
within the group from 0, as an argument.
"""


class Retrieval(NamedTuple):
    """A layer's query, and how much it takes from each layer of its group so far."""

    query: Tensor
    """``[B, heads, d_k]``."""
    scores: Tensor
    """``[B, heads, t]``: the weight of layer s = 1 ... t in the output of layer t."""
    memory: Any = None
    """Anything the next layer's :meth:`LayerAttention.retrieval` needs in addition to the state."""
    sources: Sequence[int] | None = None
    """The sources of the scores, if not layers 1 to t: the last layer in each source, which begins
    after the previous source; 0 for the input of the group."""


class Carried(NamedTuple):
    """Passed from a layer to the next of its group: its output and the attention's state.

    A container between them, such as ``nn.Sequential``, passes it on unchanged, so no module stores
    the state: it cannot outlive a forward, and checkpointing, DDP and torch.compile see a pure
    function of arguments.
    """

    x: Tensor
    state: Any


class OpenReLU(nn.ReLU):
    """ReLU whose derivative at 0 is 1.

    Between a zero-initialised norm and its addition, torch's ReLU, whose derivative at 0 is 0,
    would block the gradient, and the branch would stay at zero forever.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``max(x, 0)``."""
        return x.clamp(min=0)


def start_as_identity(host: Any) -> None:
    """Make each layer attention of a network add zero at first, with some nonzero gradients.

    Args:
        host: The network; ``start_as_identity`` is called on the parts that have it.
    """
    for part in host.modules():
        start: Any = getattr(part, "start_as_identity", None)
        if start is not None:
            start()


class LayerAttention(nn.Module, metaclass=ABCMeta):
    """A module that lets a layer retrieve from the layers before it.

    The layer attention owns query, key, value and the state that is passed along a group of layers.
    The host owns the group's boundaries (it passes ``state=None`` to a group's first layer), the
    norms around the attention, drop path and the addition to the layer's output. State is passed as
    an argument and never stored on a module, so checkpointing, DDP and ``torch.compile`` keep
    working.

    Args:
        channels: C of the layer before it.
    """

    uses_shortcut: bool = False
    """Whether ``forward`` uses its ``shortcut``; otherwise hosts skip its preparation."""

    scores_sum_to_one: bool = True
    """Whether the scores of :meth:`retrieval` sum to one, as after a softmax."""

    placement: str = "after"
    """One of :data:`PLACEMENTS`; hosts refuse unsupported placements."""

    shared: tuple[str, ...] = ()
    """Names of the parts that all layers of a group share."""

    spans_stages: bool = False
    """Whether the state passes from one stage to the next, as if all layers were one group.

    A type may have an option of this name; hosts that do not pass the state on refuse True.
    """

    starts_as_identity: bool = True
    """Whether a host can start as the plain network with it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels = channels

    @abstractmethod
    def forward(self, x: Tensor, shortcut: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Retrieve for one layer.

        Args:
            x: The layer's output, ``[B, C, H, W]``.
            shortcut: The layer's identity branch, shaped like ``x``.
            state: What the previous layer of the group returned, None for the first.

        Returns:
            ``(o, state)``: what was retrieved, shaped like ``x``, and the state for the next layer.
        """

    @property
    def scores_label(self) -> str:
        """A short description of the scores of :meth:`retrieval`, for figures."""
        return "attention score"

    def retrieval(self, x: Tensor, shortcut: Tensor, state: Any, memory: Any = None) -> Retrieval:
        """Return what :meth:`forward` attends to, given the same arguments, without side effects.

        Not needed to train or run a network; used by :mod:`mmrla.analysis`.

        Args:
            x: As in :meth:`forward`.
            shortcut: As in :meth:`forward`.
            state: As in :meth:`forward`: what the previous layer's ``forward`` returned.
            memory: ``memory`` of the previous layer's retrieval, None for a group's first layer.

        Returns:
            Query and scores, in float32 or wider.

        Raises:
            NotImplementedError: This type does not support it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell what it attends to")

    def share(self, first: LayerAttention) -> None:
        """Take the group's shared parts from its first layer; called once by hosts that can.

        Only the first layer owns their weights: here they are not child modules, so state dicts
        contain them once.

        Args:
            first: The layer attention of the group's first layer.
        """
        for name in self.shared:
            delattr(self, name)
            self.__dict__[name] = getattr(first, name)

    def cross(self, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        """Build the parts that pass the state of one stage to the next, if :attr:`spans_stages`.

        Called once on the first layer of each stage that receives a state. Default: nothing.

        Args:
            channels: C of the stage that the state comes from.
            stride: The layer's.
            norm: Makes a norm of the host's kind for a number of channels.
        """

    def join(self, conv: nn.Conv2d, stride: int, norm: Callable[[int], nn.Module]) -> None:
        """Build parts that depend on the layer; called once, if ``placement`` is ``'input'``.

        Args:
            conv: The layer's first convolution.
            stride: The layer's.
            norm: Makes a norm of the host's kind for a number of channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not sit at a layer's input")

    def at_input(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Addend of the layer's first convolution of ``x``, if ``placement`` is ``'input'``.

        Args:
            x: The layer's input, ``[B, C_in, H, W]``.
            state: What the previous layer returned, None for the first.

        Returns:
            The addend, shaped like the convolution's output, and the state for :meth:`forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not sit at a layer's input")

    def output(self, norm: Callable[[int], nn.Module]) -> nn.Module | None:
        """Build the module that makes a map from the last layer's state for the host to append.

        Called once, on the last layer's. Default: nothing is appended.

        Args:
            norm: Makes a norm of the host's kind for a number of channels.
        """
        return None

    def start_as_identity(self) -> None:
        """Remove all effect on the layer, if ``placement`` is not ``'after'``; for warm starts.

        Default: nothing. For ``'after'``, hosts do this with the norm.
        """

    def fuses_tail(
        self, z: Tensor, norm: nn.Module, out_norm: nn.Module, act: type[nn.Module] = nn.Identity
    ) -> bool:
        """Whether :meth:`tail` can run on ``z`` with these norms. Default: never.

        Args:
            z: As in :meth:`tail`.
            norm: Likewise.
            out_norm: Likewise.
            act: The class of the activation after ``out_norm``, which :meth:`tail` then includes.
        """
        return False

    def tail(
        self, z: Tensor, shortcut: Tensor, state: Any, norm: nn.BatchNorm2d,
        out_norm: nn.BatchNorm2d, scale: Tensor | None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """The end of a residual block in one operation, if :meth:`fuses_tail` returns True.

        ``y = relu(norm(z) + shortcut)``, ``out = y + scale * act(out_norm(o))`` with
        ``(o, state) = forward(y, shortcut, state)``.

        Args:
            z: The output of the block's last convolution, ``[B, C, H, W]``.
            shortcut: The block's identity branch, shaped like ``z``.
            state: As in :meth:`forward`.
            norm: The norm after the last convolution.
            out_norm: The norm after the attention.
            scale: ``[B]``, drop path's factors, or None for 1.

        Returns:
            ``(out, state)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fused tail")

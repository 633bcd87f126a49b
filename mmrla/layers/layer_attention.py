"""The contract between a host network and a layer attention."""

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
"""What a layer attention's ``placement`` may be.

``after``: ``x`` is the layer's output, and the host adds ``drop_path(norm(o))`` to it. ``branch``:
``x`` is the residual branch after its last norm, and ``o`` takes its place. ``input``: as
``branch``, and :meth:`LayerAttention.at_input` adds to the layer's first convolution. ``output``:
as ``after``, but ``o`` takes the place of ``x``. ``sublayer``: ``x`` is what an attention or an MLP
gives, without the addition, ``shortcut`` what it read in front of its norm, and ``o`` what the next
one reads; all are tokens ``[B, N, C]``. A type with one of the last two places may take ``index``,
its number along the group from 0, as an argument.
"""


class Retrieval(NamedTuple):
    """What one layer asks for, and how much it takes from each layer of its group so far."""

    query: Tensor
    """``[B, heads, d_k]``."""
    scores: Tensor
    """``[B, heads, t]``: the weight of layer s = 1 ... t in what layer t retrieves."""
    memory: Any = None
    """Whatever the next layer's :meth:`LayerAttention.retrieval` needs of this one beyond state."""
    sources: Sequence[int] | None = None
    """What the scores are of, where not of layers 1 to t: the last layer that each source holds,
    which begins after the source before; 0 for what entered the group."""


class Carried(NamedTuple):
    """What a layer hands to the next of its group: its output and the state of the attention.

    A container between them, such as ``nn.Sequential``, passes it on unseen, so the state is
    nobody's attribute: it cannot outlive a forward, and checkpointing, DDP and torch.compile see a
    function of arguments.
    """

    x: Tensor
    state: Any


class OpenReLU(nn.ReLU):
    """ReLU whose derivative at 0 is 1.

    Between a norm that starts at zero and its addition, torch's own, whose derivative there is 0,
    would pass no gradient, and the branch would stay at zero for good.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``max(x, 0)``."""
        return x.clamp(min=0)


def start_as_identity(host: Any) -> None:
    """Let each layer attention of a network add nothing at first; its gradients are not all zero.

    Args:
        host: Its parts that have a method ``start_as_identity`` are asked.
    """
    for part in host.modules():
        start: Any = getattr(part, "start_as_identity", None)
        if start is not None:
            start()


class LayerAttention(nn.Module, metaclass=ABCMeta):
    """A module that lets a layer retrieve from the layers before it.

    The layer attention owns query, key, value and the state that travels along a group of layers.
    The host owns the group's boundaries (it passes ``state=None`` to a group's first layer), the
    norms around the attention, drop path and the addition to the layer's output. State is passed,
    never kept on a module, so checkpointing, DDP and ``torch.compile`` keep working.

    Args:
        channels: C of the layer it sits after.
    """

    uses_shortcut: bool = False
    """Whether ``forward`` looks at its ``shortcut``; hosts skip what only prepares it otherwise."""

    scores_sum_to_one: bool = True
    """Whether the scores of :meth:`retrieval` are shares, as a softmax gives them."""

    placement: str = "after"
    """Where it sits, one of :data:`PLACEMENTS`; a host refuses those that it has no place for."""

    shared: tuple[str, ...] = ()
    """Names of the parts that all layers of a group share."""

    spans_stages: bool = False
    """Whether the state goes on from a stage to the next one, as if all layers were one group.

    A type may have an option of this name; a host that hands no state on refuses True.
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
        """What the scores of :meth:`retrieval` are, in the few words that fit beside a figure."""
        return "attention score"

    def retrieval(self, x: Tensor, shortcut: Tensor, state: Any, memory: Any = None) -> Retrieval:
        """Tell what :meth:`forward` attends to, given the same arguments; changes nothing.

        Not needed to train or run a network: :mod:`mmrla.analysis` draws what it tells.

        Args:
            x: As in :meth:`forward`.
            shortcut: As in :meth:`forward`.
            state: As in :meth:`forward`: what the previous layer's ``forward`` returned.
            memory: ``memory`` of the previous layer's retrieval, None for a group's first layer.

        Returns:
            Query and scores, in float32 or wider.

        Raises:
            NotImplementedError: This type does not tell.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell what it attends to")

    def share(self, first: LayerAttention) -> None:
        """Take the group's shared parts from its first layer; called once by hosts that can.

        The first layer alone holds their weights: here they are no children, so that state dicts
        have them once.

        Args:
            first: The layer attention of the group's first layer.
        """
        for name in self.shared:
            delattr(self, name)
            self.__dict__[name] = getattr(first, name)

    def cross(self, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        """Build what brings the state of one stage to the next, where :attr:`spans_stages`.

        Called once on the first layer of each stage that a state arrives at. Default: nothing.

        Args:
            channels: C of the stage that the state comes from.
            stride: The layer's.
            norm: Makes a norm of the host's kind for a number of channels.
        """

    def join(self, conv: nn.Conv2d, stride: int, norm: Callable[[int], nn.Module]) -> None:
        """Build what depends on the layer; called once, where ``placement`` is ``'input'``.

        Args:
            conv: The layer's first convolution.
            stride: The layer's.
            norm: Makes a norm of the host's kind for a number of channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not sit at a layer's input")

    def at_input(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """What adds to the layer's first convolution of ``x``, where ``placement`` is ``'input'``.

        Args:
            x: The layer's input, ``[B, C_in, H, W]``.
            state: What the previous layer returned, None for the first.

        Returns:
            The addend, shaped like the convolution's output, and the state for :meth:`forward`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not sit at a layer's input")

    def output(self, norm: Callable[[int], nn.Module]) -> nn.Module | None:
        """Build what makes a map of the last layer's state that the host appends to its last one.

        Called once, on the last layer's. Default: nothing is appended.

        Args:
            norm: Makes a norm of the host's kind for a number of channels.
        """
        return None

    def start_as_identity(self) -> None:
        """Lose all effect on the layer, where ``placement`` is not ``'after'``; for warm starts.

        Default: nothing. After a layer, hosts see to it by the norm.
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
        self,
        z: Tensor,
        shortcut: Tensor,
        state: Any,
        norm: nn.BatchNorm2d,
        out_norm: nn.BatchNorm2d,
        scale: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """The end of a residual block in one operation, where :meth:`fuses_tail` says so.

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

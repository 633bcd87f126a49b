"""Residual blocks of mmpretrain that take plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmrla.models.plugins.builder import plugin_class, plugin_name
from mmrla.models.plugins.contract import BranchPlugin, ConvPlugin


class PluginBlock:
    """Adds plugins to a residual block of mmpretrain; a mixin placed before that class.

    A plugin comes after norm and activation of convolution i (``after_conv<i>``; for the last
    convolution after its norm, before the residual addition) or after the whole block
    (``after_block``), or it replaces a convolution (``conv<i>``).
    """

    convs: int
    """Number of convolutions of the block."""
    plugin_names: tuple[str, ...] = ()
    """The block's attributes that are plugins."""

    def add_plugins(self, plugins: Sequence[Mapping[str, Any]]) -> None:
        """Build checked ``plugins`` (:func:`mmrla.models.plugins.check_plugins`) into the block.

        Raises:
            TypeError: A plugin does not take its arguments.
            ValueError: Its arguments are invalid, or two plugins have the same name.
        """
        self._plugins_at: dict[str, list[str]] = {}
        for plugin in plugins:
            cls, name, position = (
                plugin_class(plugin["cfg"]),
                plugin_name(plugin),
                plugin["position"],
            )
            kwargs = {k: v for k, v in plugin["cfg"].items() if k not in ("type", "postfix")}
            if name in self.plugin_names or (
                hasattr(self, name) and not issubclass(cls, ConvPlugin)
            ):
                raise ValueError(f"plugins: two are called {name!r}; tell them apart by postfix")
            try:
                module = cls(**self._plugin_arguments(cls, position), **kwargs)
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"plugins: plugin {cls.__name__}: {error}") from error
            setattr(self, name, module)
            self.plugin_names = (*self.plugin_names, name)
            if not issubclass(cls, ConvPlugin):
                self._plugins_at.setdefault(position, []).append(name)

    def _plugin_arguments(self, cls: type[nn.Module], position: str) -> dict[str, Any]:
        if issubclass(cls, ConvPlugin):
            conv: Any = getattr(self, position)
            names = ("kernel_size", "stride", "padding", "dilation")
            # The convolutions of these blocks are square, so one number says it.
            square = {name: getattr(conv, name)[0] for name in names}
            return dict(
                in_channels=conv.in_channels,
                out_channels=conv.out_channels,
                groups=conv.groups,
                **square,
            )
        if position == "after_block":
            return dict(in_channels=self.out_channels)
        channels: list[int] = [self.in_channels]
        for i in range(self.convs - 1):
            channels.append(self._norm_channels(i))
        if issubclass(cls, BranchPlugin):
            return dict(
                in_channels=self.out_channels,
                branch_channels=channels,
                norm_cfg=self.norm_cfg,
            )
        index = int(position.removeprefix("after_conv"))
        channels.append(self.out_channels)
        return dict(in_channels=channels[index])

    def _norm_channels(self, index: int) -> int:
        """Channels of the output of convolution ``index``."""
        norm = getattr(self, f"norm{index + 1}")
        return getattr(norm, "num_features", None) or norm.num_channels

    def _ends_with_plugins(self) -> bool:
        """Whether there are plugins between the last norm and the residual addition."""
        return bool(self.plugin_names) and f"after_conv{self.convs}" in self._plugins_at

    def _residual_with_plugins(self, x: Tensor, first: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The branch before its last norm, and the inputs of its convolutions.

        ``first`` is the output of the first convolution of ``x``.
        """
        features = [x]
        for i in range(self.convs - 1):
            features.append(self._between(first, i, getattr(self, f"norm{i + 1}")))
            first = getattr(self, f"conv{i + 2}")(features[-1])
        return first, features

    def _between(self, x: Tensor, index: int, norm: nn.Module) -> Tensor:
        x = self.relu(norm(x))
        return self._run_plugins(x, f"after_conv{index + 1}")

    def _run_plugins(self, x: Tensor, position: str, features: Sequence[Tensor] = ()) -> Tensor:
        for name in self._plugins_at.get(position, ()):
            plugin = getattr(self, name)
            more = (features, self._rerun) if isinstance(plugin, BranchPlugin) else ()
            x = plugin(x, *more)
        return x

    def _rerun(self, first: int, x: Tensor, norms: Sequence[nn.Module]) -> Tensor:
        for i, norm in zip(range(first, self.convs), norms, strict=True):
            x = getattr(self, f"conv{i + 1}")(x)
            x = norm(x) if i == self.convs - 1 else self._between(x, i, norm)
        return x

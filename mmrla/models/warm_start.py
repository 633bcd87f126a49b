"""Starting an MRLA network from the weights of the plain one."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.logging import print_log
from torch import nn

from mmrla.checkpoints import convert_state_dict, load_file, load_into, state_dict_of
from mmrla.checkpoints.files import CheckpointError
from mmrla.checkpoints.report import is_mrla_key
from mmrla.registry import WEIGHT_INITIALIZERS


@WEIGHT_INITIALIZERS.register_module()
class WarmStart:
    """Fill an MRLA network from a checkpoint, so that it starts as the network that was saved.

    From a plain checkpoint (torchvision's, timm's or mmpretrain's key names) the network computes
    exactly the plain network at step 0: the norms behind the layer attentions start at gamma = 0,
    so that MRLA grows in from the first step on. A checkpoint with MRLA weights (mmrla's or the
    released key names) is taken as it is.

    With ``frozen_stages`` or ``norm_eval`` a freshly initialised layer attention stays trainable
    and its norms keep learning statistics, while one that came from the checkpoint is frozen like
    the rest.

    Args:
        checkpoint: A local file, ``torchvision://resnet50``, an http(s) address, ...
        freeze_mrla: True freezes the MRLA parts of frozen stages (and their norms, with
            ``norm_eval``) whatever the checkpoint holds, False never does. Default None: as above.
        allow_missing: Patterns of keys of the model that the checkpoint may lack.

    Raises:
        mmrla.checkpoints.files.CheckpointError: The file cannot be read, does not fit, or holds
            MRLA weights although the network was built to keep its MRLA parts trainable.
    """

    def __init__(
        self,
        checkpoint: str,
        freeze_mrla: bool | None = None,
        allow_missing: Sequence[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.freeze_mrla = freeze_mrla
        self.allow_missing = tuple(allow_missing)

    def __call__(self, module: nn.Module) -> None:
        """Fill ``module``, a host of layer attentions; called by mmengine."""
        state = state_dict_of(load_file(self.checkpoint))
        if any(key.startswith("backbone.") for key in state):
            # Of a detector or classifier, only the backbone concerns us.
            state = {k: v for k, v in state.items() if k.startswith("backbone.")}
        converted = convert_state_dict(state)
        own = module.state_dict()
        if not any(is_mrla_key(key) for key in converted):
            self._zero_norms(module)
        elif self.freeze_mrla is None and getattr(module, "keep_mrla_trainable", False):
            raise CheckpointError(
                f"{self.checkpoint}: holds MRLA weights, which could not be known when the network "
                "was built; say freeze_mrla=True (as the paper) or freeze_mrla=False in init_cfg"
            )
        load_into(
            module,
            {k: v for k, v in converted.items() if k.startswith("backbone.")},
            allow_missing=self.allow_missing,
            source=f"warm start from {self.checkpoint}",
        )
        fresh = sorted(k for k in own if is_mrla_key(k) and f"backbone.{k}" not in converted)
        if fresh:
            print_log(f"{len(fresh)} tensors of layer attentions start fresh", logger="current")

    @staticmethod
    def _zero_norms(module: nn.Module) -> None:
        for block in module.modules():
            norm = getattr(block, "mrla_norm", None) if getattr(block, "mrla", None) else None
            if norm is not None:
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)

    def _get_init_info(self) -> str:
        return f"WarmStart from {self.checkpoint}"

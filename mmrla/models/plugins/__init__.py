"""Within-layer attentions: plugins of the residual blocks of every ResNet host."""

from mmrla.models.plugins.attention_augmented import AttentionAugmentedConv
from mmrla.models.plugins.block import PluginBlock
from mmrla.models.plugins.bridge_attention import BridgeAttention
from mmrla.models.plugins.builder import check_plugins, plugins_of_block, plugins_of_stage
from mmrla.models.plugins.cbam import CBAM
from mmrla.models.plugins.contract import BranchPlugin, ConvPlugin
from mmrla.models.plugins.double_attention import DoubleAttention
from mmrla.models.plugins.eca import ECA
from mmrla.models.plugins.se import SE
from mmrla.models.plugins.tdam import TDAM

__all__ = [
    "CBAM", "ECA", "SE", "TDAM", "AttentionAugmentedConv", "BranchPlugin", "BridgeAttention",
    "ConvPlugin", "DoubleAttention", "PluginBlock", "check_plugins", "plugins_of_block",
    "plugins_of_stage",
]  # fmt: skip

"""Building blocks of the commands: from a config file and options to a checked run."""

from mmrla.engine.amp import AmpOptimWrapper
from mmrla.engine.data.config import check_data, set_data_root
from mmrla.engine.errors import exit_with_message
from mmrla.engine.errors import reporting_errors as reporting_errors
from mmrla.engine.layout import ChannelsLastHook, use_channels_last
from mmrla.engine.run.config import load_config
from mmrla.engine.run.finite_check import NonFiniteError, NonFiniteGuardHook
from mmrla.engine.run.hooks import (
    CheckLoadHook,
    FasterCocoMetric,
    LayerAttentionVisHook,
    LogIntervalHook,
    TrimHeapHook,
)
from mmrla.engine.run.resume import AtomicCheckpointHook, ResumableTrainLoop
from mmrla.engine.run.runner import FSDPStrategy, build_runner, init_cpu_distributed

__all__ = [
    "AmpOptimWrapper", "AtomicCheckpointHook", "ChannelsLastHook", "CheckLoadHook", "FSDPStrategy",
    "FasterCocoMetric", "LayerAttentionVisHook", "LogIntervalHook", "NonFiniteError",
    "NonFiniteGuardHook", "ResumableTrainLoop", "TrimHeapHook", "build_runner", "check_data",
    "exit_with_message", "init_cpu_distributed", "load_config", "set_data_root",
    "use_channels_last",
]  # fmt: skip

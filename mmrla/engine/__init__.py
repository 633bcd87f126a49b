"""Building blocks of the commands: from a config file and options to a checked run."""

from mmrla.engine.amp import AmpOptimWrapper
from mmrla.engine.data_check import check_data, set_data_root
from mmrla.engine.errors import exit_with_message
from mmrla.engine.errors import reporting_errors as reporting_errors
from mmrla.engine.evaluation import FasterCocoMetric
from mmrla.engine.finite_check import NonFiniteError, NonFiniteGuardHook
from mmrla.engine.hooks import CheckLoadHook, LayerAttentionVisHook, LogIntervalHook, TrimHeapHook
from mmrla.engine.launch import build_runner, init_cpu_distributed, load_config
from mmrla.engine.layout import ChannelsLastHook, use_channels_last
from mmrla.engine.resume import AtomicCheckpointHook, ResumableTrainLoop
from mmrla.engine.strategy import FSDPStrategy

__all__ = [
    "AmpOptimWrapper",
    "AtomicCheckpointHook",
    "ChannelsLastHook",
    "CheckLoadHook",
    "FSDPStrategy",
    "FasterCocoMetric",
    "LayerAttentionVisHook",
    "LogIntervalHook",
    "NonFiniteError",
    "NonFiniteGuardHook",
    "ResumableTrainLoop",
    "TrimHeapHook",
    "build_runner",
    "check_data",
    "exit_with_message",
    "init_cpu_distributed",
    "load_config",
    "set_data_root",
    "use_channels_last",
]

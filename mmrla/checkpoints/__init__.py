"""Weights: reading files safely, load reports, conversion, and warm start."""

from mmrla.checkpoints.convert import Conversion, convert_state_dict, detect, to_released
from mmrla.checkpoints.files import load_file, state_dict_of
from mmrla.checkpoints.report import LoadReport, compare, load_into

__all__ = [
    "Conversion", "LoadReport", "compare", "convert_state_dict", "detect", "load_file", "load_into",
    "state_dict_of", "to_released",
]  # fmt: skip

"""Functions on tensors. This floor imports torch alone."""

from mmrla.ops.dispatch import Backend, Op, Selection
from mmrla.ops.mrla_base import mrla_base
from mmrla.ops.mrla_light import mrla_light
from mmrla.ops.query_key import eca_kernel_size, query_key

__all__ = [
    "Backend",
    "Op",
    "Selection",
    "eca_kernel_size",
    "mrla_base",
    "mrla_light",
    "query_key",
]

"""Functions on tensors. This floor imports torch alone."""

from mmrla.ops.batch_norm import BatchNorm
from mmrla.ops.dispatch import Backend, Op, Selection
from mmrla.ops.linear_rla import linear_rla
from mmrla.ops.mla import mla
from mmrla.ops.mrla_base import mrla_base, mrla_base_tail
from mmrla.ops.mrla_light import mrla_light, mrla_light_tail
from mmrla.ops.query_key import eca_kernel_size, query_key

__all__ = [
    "Backend",
    "BatchNorm",
    "Op",
    "Selection",
    "eca_kernel_size",
    "linear_rla",
    "mla",
    "mrla_base",
    "mrla_base_tail",
    "mrla_light",
    "mrla_light_tail",
    "query_key",
]

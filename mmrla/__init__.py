"""MRLA, multi-head recurrent layer attention (ICLR 2023), for the OpenMMLab ecosystem.

Importing this package needs torch alone. It also makes mmcv usable where its compiled
extension is missing, see :mod:`mmrla.compat`.
"""

from mmrla.compat import install_mmcv_fallback
from mmrla.version import __version__

# Must happen before anything imports mmcv.ops, hence on import of the package itself.
install_mmcv_fallback()

__all__ = ["__version__"]

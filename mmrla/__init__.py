"""MRLA, multi-head recurrent layer attention (ICLR 2023), for the OpenMMLab ecosystem.

Importing this package needs torch alone. It also makes mmcv usable where its compiled
extension is missing, see :mod:`mmrla.compat`, teaches mm packages mmrla's names, see
:mod:`mmrla.names`, and stops loads of weights that load nothing and runs whose heads do not fit the
data, see :mod:`mmrla.loads` and :mod:`mmrla.runs`.
"""

from mmrla.compat import install_mmcv_fallback, mend_mm_packages
from mmrla.configs import config_path, get_config, list_configs
from mmrla.loads import install_loads
from mmrla.names import install_names
from mmrla.runs import install_runs
from mmrla.version import __version__

# Must happen before anything imports mmcv.ops, hence on import of the package itself.
install_mmcv_fallback()
mend_mm_packages()
install_names()
install_loads()
install_runs()

__all__ = ["__version__", "config_path", "get_config", "list_configs"]

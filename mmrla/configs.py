"""The configs that ship with the package, by name.

In a wheel they are in ``mmrla/.mim``, where mim and mmengine look; in a checkout that folder links
to ``configs/``, ``tools/`` and ``model-index.yml``.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

MIM = Path(__file__).parent / ".mim"
ROOT = (MIM / "configs").resolve().parent
"""The checkout; of a wheel, the folder with ``configs/`` and ``tools/``."""
SCOPE = "mmrla::"


def list_configs(pattern: str = "*") -> list[str]:
    """Names of the configs, sorted.

    Args:
        pattern: As in :mod:`fnmatch`, for the whole name, such as ``'mask*'`` or ``'imagenet/*'``.

    Returns:
        Names as :func:`get_config` takes them: the path below ``configs/`` without ``.py``.
    """
    folder = MIM / "configs"
    # Two levels by hand: rglob does not follow the links of a checkout before Python 3.13.
    found = [*folder.glob("*.py"), *folder.glob("[!_]*/*.py")]
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in found)
    return sorted(
        n for n in names if not n.rpartition("/")[2].startswith("_") and fnmatch(n, pattern)
    )


def find_config(name: str) -> str | None:
    """The config of a model in the model index.

    Args:
        name: Name of the model, which is that of the config without its folder, or the config's,
            with or without ``.py`` and ``mmrla::``. Case does not matter.

    Returns:
        A name as in :func:`list_configs`, or None.
    """
    wanted = name.removeprefix(SCOPE).removesuffix(".py").lower()
    return next(
        (n for n in list_configs() if wanted in (n.lower(), n.rpartition("/")[2].lower())), None
    )


def config_path(name: str) -> str:
    """The file of a config.

    Args:
        name: As :func:`list_configs` gives it, with or without ``.py`` and ``mmrla::``.

    Returns:
        Its absolute path; in a checkout, that of the file in ``configs/``.

    Raises:
        FileNotFoundError: There is no such config; the message names similar ones.
        ValueError: The name leads out of the folder of configs.
    """
    stem = name.removeprefix(SCOPE).removesuffix(".py")
    if Path(stem).is_absolute() or ".." in stem.replace("\\", "/").split("/"):
        raise ValueError(f"{name!r} is no name of a config: it leads out of mmrla's configs")
    path = MIM / "configs" / f"{stem}.py"
    if path.is_file():
        return str(path.resolve())  # in a checkout, the file and not the link
    known = list_configs()
    # Also where the folder was left out, or written where there is none.
    tails = {known_name.rpartition("/")[2]: known_name for known_name in reversed(known)}
    close = difflib.get_close_matches(stem.rpartition("/")[2], tails, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(tails[tail] for tail in close)}?" if close else ""
    raise FileNotFoundError(f"mmrla has no config {stem!r}{hint} (mmrla list shows all)")


def get_config(name: str) -> Config:
    """Read a config that ships with the package.

    Args:
        name: As :func:`list_configs` gives it, with or without ``.py``.

    Returns:
        mmengine's Config, including everything inherited.

    Raises:
        FileNotFoundError: There is no such config; the message names similar ones.
    """
    from mmengine.config import Config

    return Config.fromfile(config_path(name))

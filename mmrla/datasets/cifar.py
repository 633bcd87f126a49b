"""CIFAR-10 and CIFAR-100 from the official files or from folders of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmpretrain.datasets import CIFAR10, CIFAR100

from mmrla.datasets.images import images_in
from mmrla.registry import DATASETS


class _Folders:
    """Reads ``<data_root>/<split>/<class>/*.jpg`` if it exists; a mixin before a dataset."""

    def load_data_list(self) -> list[dict[str, Any]]:
        """Images in RGB, ``[32, 32, 3]`` of uint8, with their labels.

        Raises:
            FileNotFoundError: There are neither the official files nor folders of images.
            ValueError: A class has no folder, or an image is not 32 x 32.
        """
        root = Path(self.data_prefix["root"])
        folder = root / self.split
        if folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
            return list(self._read(folder))
        official = root / self.base_folder
        if not self.download and not official.is_dir():
            raise FileNotFoundError(
                f"no {type(self).__name__} in {root.absolute()}: neither {official.name}/ (the "
                f"official files, for Python) nor {folder.name}/<class>/*.jpg"
            )
        return super().load_data_list()

    def _read(self, folder: Path) -> Iterator[dict[str, Any]]:
        for label, name in enumerate(self.CLASSES):
            paths = images_in(folder / name)
            if not paths:
                raise ValueError(f"{folder.absolute()} has no images of class {name!r}")
            for path in paths:
                image = mmcv.imread(path, channel_order="rgb")
                if image is None or image.shape != (32, 32, 3):
                    got = "unreadable" if image is None else f"{image.shape[1]} x {image.shape[0]}"
                    raise ValueError(f"{path}: images must be 32 x 32, got {got}")
                yield dict(img=image, gt_label=label)


@DATASETS.register_module(name="CIFAR10")
class FolderCIFAR10(_Folders, CIFAR10):
    """mmpretrain's CIFAR-10, which also takes folders of images.

    ``data_root`` contains ``cifar-10-batches-py/`` or ``{train,test}/<class>/*.jpg``.

    Args:
        data_root: The folder.
        split: ``'train'`` or ``'test'``.
        download: Download the official files if there are none. Default False.
        **kwargs: As in :class:`mmpretrain.datasets.CIFAR10`.
    """

    def __init__(self, *args: Any, download: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, download=download, **kwargs)


@DATASETS.register_module(name="CIFAR100")
class FolderCIFAR100(_Folders, CIFAR100):
    """mmpretrain's CIFAR-100, which also takes folders of images; see :class:`FolderCIFAR10`."""

    def __init__(self, *args: Any, download: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, download=download, **kwargs)


def as_arrays(dataset: CIFAR10) -> tuple[np.ndarray, np.ndarray]:
    """All images ``[N, 32, 32, 3]`` (RGB, uint8) and labels ``[N]`` of a CIFAR dataset."""
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    images = np.stack([info["img"] for info in infos])
    return images, np.array([info["gt_label"] for info in infos], dtype=np.int64)

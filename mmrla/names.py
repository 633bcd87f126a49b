"""Makes mmrla's names work in mm packages: ``mmrla::...``, model hubs, inferencers.

mmengine has a fixed list of packages, and mmpretrain and mmdet look up models only in their own
index. The functions that resolve names are extended when their modules are imported. This only
works in processes that import mmrla; :mod:`mmrla.startup` enables it in all.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from mmrla.compat.on_import import after_import
from mmrla.configs import MIM, SCOPE, config_path, find_config, get_config, list_configs

_UNPUBLISHED = "mmrla-unpublished://"


def _extend_table(utils: ModuleType) -> None:
    utils.MODULE2PACKAGE["mmrla"] = "mmrla"


def _extend_config(module: ModuleType) -> None:
    """``_base_ = 'mmrla::NAME'`` and ``with read_base(): from mmrla.configs.NAME import *``."""
    config = module.Config
    get_path, parse, installed = (
        config._get_cfg_path, config._parse_lazy_import, module.get_installed_path,
    )  # fmt: skip

    @functools.wraps(get_path)
    def _get_cfg_path(cfg_path: str, filename: str) -> Any:
        if cfg_path.startswith(SCOPE):
            # No scope: types without a prefix are those of the default scope, here as anywhere.
            return config_path(cfg_path), None
        return get_path(cfg_path, filename)

    @functools.wraps(installed)
    def get_installed_path(package: str) -> str:
        return str(MIM) if package == "mmrla" else installed(package)

    @functools.wraps(parse)
    def _parse_lazy_import(filename: str) -> Any:
        if Path(filename).is_relative_to(MIM):
            # mmengine refuses chains of both styles, because types without a prefix and `_delete_`
            # mean something else there. Ours is read whole, so a plain dict arrives.
            return config.fromfile(filename, lazy_import=False)._cfg_dict, set()
        return parse(filename)

    config._get_cfg_path = staticmethod(_get_cfg_path)
    config._parse_lazy_import = staticmethod(_parse_lazy_import)
    module.get_installed_path = get_installed_path


def _without_weights(name: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"no weights of {name} are published, so there is nothing to load for pretrained=True: "
        "name a checkpoint, or train from the plain network's weights (docs/weights.md)"
    )


def _extend_hub(hub: ModuleType) -> None:
    """``mmengine.hub.get_config`` and ``get_model``, in the default scope of the config."""
    config_of, model_of = hub.get_config, hub.get_model

    @functools.wraps(config_of)
    def get_cfg(cfg_path: str, pretrained: bool = False) -> Any:
        if not cfg_path.startswith(SCOPE):
            return config_of(cfg_path, pretrained)
        cfg = get_config(cfg_path)
        if pretrained:
            raise _without_weights(cfg_path)
        return cfg

    @functools.wraps(model_of)
    def get_model(cfg_path: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if not cfg_path.startswith(SCOPE):
            return model_of(cfg_path, pretrained, **kwargs)
        cfg = get_cfg(cfg_path, pretrained)
        if "data_preprocessor" in cfg:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        with hub.DefaultScope.overwrite_default_scope(cfg.default_scope):
            return hub.MODELS.build(cfg.model, default_args=kwargs)

    hub.get_config, hub.get_model = get_cfg, get_model


def _extend_inferencer(infer: ModuleType) -> None:
    """``DetInferencer('mask_rcnn_r50_mrla_1x')``: names of models, beside the package's own."""
    cls = infer.BaseInferencer
    load = cls._load_model_from_metafile

    @functools.wraps(load)
    def _load_model_from_metafile(self: Any, model: str) -> Any:
        name = find_config(model)
        return load(self, model) if name is None else (get_config(name), None)

    cls._load_model_from_metafile = _load_model_from_metafile


def _extend_model_hub(model: ModuleType) -> None:
    """``mmpretrain.list_models`` and ``get_model``."""
    hub = model.ModelHub
    register, get = hub._register_mmpretrain_models, hub.get
    ours = {name.rpartition("/")[2].lower() for name in list_configs()}

    def _register_mmpretrain_models() -> None:
        register()
        if not ours <= hub._models_dict.keys():
            hub.register_model_index(MIM / "model-index.yml", config_prefix=MIM)

    @functools.wraps(get)
    def get_ours(model_name: str) -> Any:
        found = get(model_name)
        if model_name.lower() in ours:
            # Detectors are built by mmdet, although mmpretrain is asked.
            found.config.model.setdefault("_scope_", found.config.default_scope)
            if found.weights is None:
                found.weights = _UNPUBLISHED + found.name
                _refuse_unpublished()
        return found

    hub._register_mmpretrain_models = staticmethod(_register_mmpretrain_models)
    hub.get = staticmethod(get_ours)


def _refuse_unpublished() -> None:
    """If ``weights`` is None, mmpretrain would warn and continue with random weights."""
    from mmengine.runner.checkpoint import CheckpointLoader

    def refuse(filename: str, map_location: Any = None, **kwargs: Any) -> None:
        raise _without_weights(filename.removeprefix(_UNPUBLISHED))

    CheckpointLoader.register_scheme(prefixes=_UNPUBLISHED, loader=refuse, force=True)


def install_names() -> None:
    """Extend the functions of mm packages that resolve names. Calling it again does nothing.

    Imports nothing: modules already imported are extended now, others when they are imported.
    """
    after_import("mmengine.config.utils", _extend_table)
    after_import("mmengine.config.config", _extend_config)
    after_import("mmengine.hub.hub", _extend_hub)
    after_import("mmengine.infer.infer", _extend_inferencer)
    after_import("mmpretrain.apis.model", _extend_model_hub)

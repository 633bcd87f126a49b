# ResNet + MRLA-light for COCO detectors.
_base_ = "./coco.py"

on_coco = dict(
    model=dict(
        backbone=dict(
            type="mmrla.MRLAResNet",
            layer_attention=dict(type="MRLALight", head_channels=32),
            # From the base's torchvision checkpoint; MRLA grows in.
            init_cfg=dict(type="mmrla.WarmStart"),
        )
    )
)

# Norms after fresh layer attentions learn statistics; every process ends an epoch with the same.
custom_hooks = [dict(type="SyncBuffersHook")]

"""A second list: networks of more libraries, for tasks from classification to diffusion.

    pip install -r benchmarks/conformance/requirements.txt
    python benchmarks/conformance/run.py --list foreign

Nothing of these libraries is copied. ultralytics is under the AGPL: it is no requirement, and its lines are skipped
where it is not installed, as are those of any other library. A line is `library:name size`, as in `models.py`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn

LIST = """
# Classification
pytorchcv:bn_vgg11 224
pytorchcv:resnet10 224
pytorchcv:preresnet10 224
pytorchcv:seresnet10 224
pytorchcv:sepreresnet10 224
pytorchcv:bam_resnet18 224
pytorchcv:diracnet18v2 224
pytorchcv:condensenet74_c4_g4 224
pytorchcv:peleenet 224
pytorchcv:dpn68 224
pytorchcv:darknet_tiny 224
pytorchcv:vovnet39 224
pytorchcv:hardnet39ds 224
pytorchcv:squeezeresnet_v1_0 224
pytorchcv:sqnxt23_w1 224
pytorchcv:shufflenet_g1_wd4 224
pytorchcv:shufflenet_g3_wd4 224
pytorchcv:shufflenetv2_wd2 224
pytorchcv:menet108_8x1_g3 224
pytorchcv:fdmobilenet_wd4 224
pytorchcv:mobilenetv2_wd4 224
pytorchcv:igcv3_wd4 224
pytorchcv:proxylessnas_mobile 224
pytorchcv:octresnet10_ad2 224
pytorchcv:nin_cifar10 32
pytorchcv:resnet20_cifar10 32
pytorchcv:preresnet20_cifar10 32
pytorchcv:seresnet20_cifar10 32
pytorchcv:sepreresnet20_cifar10 32
pytorchcv:densenet40_k12_cifar10 32
pytorchcv:xdensenet40_2_k24_bc_cifar10 32
pytorchcv:pyramidnet110_a48_cifar10 32
pytorchcv:diaresnet20_cifar10 32
pytorchcv:shakeshakeresnet20_2x16d_cifar10 32
pytorchcv:ror3_56_cifar10 32
timm:focalnet_tiny_srf 64
timm:cs3se_edgenet_x 64
timm:crossvit_9_240 240
timm:efficientnet_cc_b0_4e 64
timm:hiera_tiny_224 224
timm:nest_tiny 224
timm:pit_ti_224 224
timm:pvt_v2_b0 64
timm:tiny_vit_5m_224 224
timm:twins_pcpvt_small 64
timm:xcit_nano_12_p16_224 224
timm:mvitv2_tiny 224
# Segmentation, pose, depth
pytorchcv:cgnet_cityscapes 64
pytorchcv:dabnet_cityscapes 64
pytorchcv:lednet_cityscapes 64
pytorchcv:simplepose_resnet18_coco 64
pytorchcv:simplepose_mobile_resnet18_coco 64
pytorchcv:centernet_resnet18_voc 64
pytorchcv:lwopenpose2d_mobilenet_cmupan_coco 64
smp:Unet+resnet18 64
smp:Unet+mobilenet_v2 64
smp:UnetPlusPlus+resnet18 64
smp:MAnet+resnet18 64
smp:Linknet+resnet18 64
smp:FPN+resnet18 64
smp:PSPNet+resnet18 64
smp:PAN+resnet18 128
smp:DeepLabV3+resnet18 64
smp:DeepLabV3Plus+efficientnet-b0 64
smp:UPerNet+resnet18 64
smp:Segformer+mit_b0 64
smp:Unet+timm-regnetx_002 64
transformers:Segformer 64
transformers:DPT 64
transformers:MobileViT 64
transformers:ResNet 64
transformers:RegNet 64
transformers:ConvNextV2 64
transformers:FocalNet 64
transformers:Swin 64
transformers:PoolFormer 64
transformers:MobileNetV2 64
transformers:Bit 64
transformers:Cvt 64
monai:UNet 32
monai:BasicUNet 32
monai:SegResNet 32
monai:AttentionUnet 32
monai:DynUNet 32
monai:DenseNet121 64
monai:HighResNet 32
# Detection
ultralytics:yolov3-tiny 64
ultralytics:yolov5n 64
ultralytics:yolov6n 64
ultralytics:yolov8n 64
ultralytics:yolov8n-seg 64
ultralytics:yolov8n-pose 64
ultralytics:yolov9t 64
ultralytics:yolov10n 64
ultralytics:yolo11n 64
ultralytics:yolo11n-obb 64
ultralytics:yolo11n-cls 64
ultralytics:yolo12n 64
ultralytics:yolo26n 64
# Diffusion
diffusers:UNet2DModel 16
diffusers:UNet2DConditionModel 16
diffusers:AutoencoderKL 32
diffusers:VQModel 32
"""


MODULES = {"smp": "segmentation_models_pytorch", "zoo": "filterfold"}
"""Libraries whose module has another name than the list gives them."""


class Called(nn.Module):
    """A network that takes an image first, and other arguments that stay the same."""

    def __init__(self, net: nn.Module, *rest: Tensor) -> None:
        super().__init__()
        self.net, self.rest = net, rest

    def forward(self, image: Tensor) -> Any:
        """Call the network."""
        return self.net(image, *(r.to(image.dtype) if r.is_floating_point() else r for r in self.rest))


def build_foreign(library: str, name: str) -> nn.Module:
    """A network of this list with random weights."""
    return {
        "pytorchcv": _pytorchcv,
        "smp": _smp,
        "transformers": _transformers,
        "monai": _monai,
        "ultralytics": _ultralytics,
        "diffusers": _diffusers,
    }[library](name)


def installed(library: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(MODULES.get(library, library)) is not None


def _pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    return get_model(name)


def _smp(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    kind, encoder = name.split("+", 1)
    return getattr(smp, kind)(encoder, encoder_weights=None)


def _transformers(name: str) -> nn.Module:
    import transformers as hf

    small: dict[str, dict[str, Any]] = {
        "Segformer": {"hidden_sizes": [16, 32, 40, 64], "decoder_hidden_size": 32},
        "DPT": {
            "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 64, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 24, 32, 40],
            "fusion_hidden_size": 24,
        },
        "FocalNet": {"embed_dim": 16, "depths": [1, 1, 2, 1], "image_size": 64},
        "Swin": {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64},
        "ConvNextV2": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
        "ResNet": {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 2, 1, 1]},
        "RegNet": {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 96], "depths": [1, 2, 1, 1], "groups_width": 16},
        "Bit": {"embedding_size": 64, "hidden_sizes": [128, 256, 384, 512], "depths": [1, 1, 1, 1]},
    }  # fmt: skip
    kinds = {"Segformer": "ForSemanticSegmentation", "DPT": "ForDepthEstimation"}
    config = getattr(hf, f"{name}Config")(**small.get(name, {}))
    return getattr(hf, name + kinds.get(name, "ForImageClassification"))(config)


def _monai(name: str) -> nn.Module:
    from monai.networks import nets

    wide = {"channels": (8, 16, 32), "strides": (2, 2)}
    options: dict[str, dict[str, Any]] = {
        "UNet": {**wide, "num_res_units": 2},
        "AttentionUnet": wide,
        "BasicUNet": {"features": (16, 16, 32, 64, 64, 16)},
        "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        "SegResNet": {"init_filters": 16},
    }
    return getattr(nets, name)(spatial_dims=2, in_channels=3, out_channels=5, **options.get(name, {}))


def _ultralytics(name: str) -> nn.Module:
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics.nn import tasks

    kinds = {"seg": "Segmentation", "pose": "Pose", "obb": "OBB", "cls": "Classification"}
    kind = kinds.get(name.partition("-")[2], "Detection")
    return getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False)


def _diffusers(name: str) -> nn.Module:
    import diffusers

    wide = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    step, text = torch.tensor([3]), torch.linspace(-1, 1, 7 * 24).view(1, 7, 24)
    if name == "UNet2DModel":
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        net = diffusers.UNet2DModel(
            sample_size=16, layers_per_block=1, down_block_types=down, up_block_types=up, **wide
        )
        return Called(net, step)
    if name == "UNet2DConditionModel":
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        net = diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, down_block_types=down,
            up_block_types=up, cross_attention_dim=24, **wide,
        )  # fmt: skip
        return Called(net, step, text)
    if name == "VQModel":
        return diffusers.VQModel(block_out_channels=(32,), norm_num_groups=8, num_vq_embeddings=32)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**blocks, **wide)

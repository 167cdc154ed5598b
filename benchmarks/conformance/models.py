"""The conformance list: ConvNets of torchvision, timm and Filterfold's own zoo, one or more of every family.

A line is `library:name size`, the size being `edge` in pixels or `frames x edge` for video networks. Sizes are the
smallest at which the network runs as meant: nothing in pruning depends on them but the time. VGG-16,
DenseNet-121 and ResNeSt-14d, whose times have a bar of their own, have their usual 224.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from . import foreign

LIST = """
# Plain and residual
torchvision:vgg16 224
torchvision:vgg11_bn 64
torchvision:alexnet 96
torchvision:squeezenet1_1 64
torchvision:resnet18 64
torchvision:resnet50 64
torchvision:resnext50_32x4d 64
torchvision:wide_resnet50_2 64
timm:resnet26d 64
timm:resnetaa50 64
timm:resnetblur50 64
timm:resnetrs50 64
timm:resnetv2_50 64
timm:resnetv2_50x1_bit 64
timm:resnetv2_50d_gn 64
timm:resnet50_gn 64
zoo:resnet20 32
zoo:resnet56 32
zoo:vgg16 32
# Attention over channels or space inside the blocks
timm:seresnet18 64
timm:seresnext26d_32x4d 64
timm:legacy_seresnet18 64
timm:senet154 64
timm:ecaresnet26t 64
timm:cbam:resnet18 64
timm:gcresnet33ts 64
timm:gcresnext26ts 64
timm:skresnet18 64
timm:skresnext50_32x4d 64
timm:resnest14d 224
timm:resnest26d 64
timm:tresnet_m 64
# Split, concatenated, aggregated
torchvision:densenet121 224
timm:densenetblur121d 64
timm:rdnet_tiny 64
torchvision:googlenet 96
torchvision:inception_v3 299
timm:inception_v4 128
timm:inception_resnet_v2 128
timm:xception41 64
timm:legacy_xception 64
timm:res2net50_26w_4s 64
timm:res2next50 64
timm:dla34 64
timm:dla46_c 64
timm:dpn48b 64
timm:hrnet_w18_small 64
timm:selecsls42 64
timm:vovnet39a 64
timm:ese_vovnet19b_slim 64
timm:cspresnet50 64
timm:cspresnext50 64
timm:cspdarknet53 64
timm:cs3darknet_s 64
timm:darknet53 64
timm:hgnet_tiny 64
timm:hgnetv2_b0 64
timm:pnasnet5large 96
timm:nasnetalarge 96
# For small devices
torchvision:mobilenet_v2 64
torchvision:mobilenet_v3_large 64
torchvision:mnasnet1_0 64
torchvision:shufflenet_v2_x0_5 64
torchvision:shufflenet_v2_x1_0 64
timm:mobilenetv1_100 64
timm:mobilenetv3_small_050 64
timm:mobilenetv4_conv_small 64
timm:mobilenetv4_hybrid_medium 64
timm:mobileone_s0 64
timm:mixnet_s 64
timm:tinynet_e 64
timm:lcnet_050 64
timm:fbnetc_100 64
timm:spnasnet_100 64
timm:semnasnet_050 64
timm:hardcorenas_a 64
timm:ghostnet_050 64
timm:ghostnetv2_100 64
timm:ghostnetv3_050 64
timm:repghostnet_050 64
timm:rexnet_100 64
timm:fasternet_t0 64
timm:starnet_s1 64
# Found by search, scaled by rule
torchvision:efficientnet_b0 64
torchvision:efficientnet_v2_s 64
timm:tf_efficientnet_b0 64
timm:tf_efficientnetv2_b0 64
timm:efficientnet_es 64
timm:efficientnet_lite0 64
torchvision:regnet_x_400mf 64
torchvision:regnet_y_400mf 64
timm:regnetz_005 64
timm:regnetv_040 64
# Re-parametrised, without normalisation, with few activations
timm:repvgg_a0 64
timm:gernet_s 64
timm:nfnet_l0 64
timm:dm_nfnet_f0 64
timm:nf_regnet_b0 64
timm:nf_resnet26 64
torchvision:convnext_tiny 64
timm:convnextv2_atto 64
timm:inception_next_atto 64
timm:convmixer_768_32 64
timm:mambaout_femto 64
timm:convformer_s18 64
timm:poolformer_s12 64
# With attention blocks
timm:repvit_m0_9 64
timm:fastvit_t8 64
timm:swiftformer_xs 224
timm:efficientformer_l1 224
timm:efficientvit_b0 64
timm:mobilevit_xxs 64
timm:mobilevitv2_050 64
timm:visformer_tiny 224
timm:edgenext_xx_small 64
timm:levit_128s 224
timm:coatnet_nano_rw_224 224
torchvision:maxvit_t 224
timm:botnet26t_256 256
timm:halonet26t 256
# Other tasks: segmentation, video
torchvision:fcn_resnet50 64
torchvision:deeplabv3_mobilenet_v3_large 64
torchvision:lraspp_mobilenet_v3_large 64
torchvision:r3d_18 8x32
torchvision:mc3_18 8x32
torchvision:r2plus1d_18 8x32
torchvision:s3d 16x224
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One network of the list: its name and the shape of its input."""

    name: str
    shape: tuple[int, ...]


def entries(which: str = "main") -> tuple[Entry, ...]:
    """The list of this file (`main`) or that of `foreign.py`, parsed; of the latter what can be imported."""
    text = LIST if which == "main" else foreign.LIST
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    if which == "foreign":
        lines = [line for line in lines if foreign.installed(line[0].partition(":")[0])]
    return tuple(Entry(name, _shape(size)) for name, size in lines)


def _shape(size: str) -> tuple[int, ...]:
    *frames, edge = map(int, size.split("x"))
    return (1, 3, *frames, edge, edge)


def build(name: str) -> Any:
    """The network with random weights (the caller seeds), in eval mode."""
    library, _, rest = name.partition(":")
    if library == "zoo":
        from filterfold.zoo import build as build_own

        return build_own(rest).eval()
    if library == "torchvision":
        return _from_torchvision(rest).eval()
    if library != "timm":
        return foreign.build_foreign(library, rest).eval()
    import timm

    if rest.startswith("cbam:"):
        return timm.create_model(rest.removeprefix("cbam:"), block_args={"attn_layer": "cbam"}).eval()
    return timm.create_model(rest).eval()


def _from_torchvision(name: str) -> Any:
    from torchvision.models import get_model_builder

    builder = get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # by scipy's truncated normal distribution: half a minute
    return builder(**options)

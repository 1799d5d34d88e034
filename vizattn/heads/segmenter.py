"""A backbone and a head, together a model that labels each pixel."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Format, LayerNorm2d, PatchEmbed
from torch import Tensor, nn

from vizattn.errors import VizattnError
from vizattn.heads.build import build, head_class
from vizattn.heads.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["Segmenter"]


class Segmenter(nn.Module):
    """A backbone's maps, each through a LayerNorm, into a segmentation head.

    Where all maps have one stride and the head is made for a pyramid, a `SimpleFeaturePyramid` on the last map comes
    between. A map is not normed again where its row of `feature_info` says ``"normed": True``.

    Args:
        backbone: What ``timm.create_model(name, features_only=True)`` gives; adapters are attached before.
        num_classes: Channels of the logits.
        head: A name in `HEADS`.
        auxiliary: Add a `FCN` head on the last map but one, for training.
        head_options: Of the head.

    Attributes:
        stride: Pixels of the image a logit, along both sides.
        head_config: ``Segmenter(backbone, **head_config)`` builds the same again; plain values.

    Raises:
        VizattnError: a backbone that gives no maps, an unknown head, option, or strides that are no pyramid.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        head: str = "semantic_fpn",
        auxiliary: bool = False,
        **head_options: Any,
    ) -> None:
        super().__init__()
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in head_options.items()}
        self.head_config = {"num_classes": num_classes, "head": head, "auxiliary": auxiliary, **plain}
        self.num_classes = num_classes
        self.backbone = backbone
        rows = _feature_rows(backbone)
        channels, strides = [row["num_chs"] for row in rows], [row["reduction"] for row in rows]
        self.fixed_size, self.divisor = _input_limits(backbone, strides)
        self.channels_last = getattr(backbone, "output_fmt", None) == Format.NHWC

        last = len(rows) - 1
        self.neck: SimpleFeaturePyramid | None = None
        if head_class(head).pyramid and len(set(strides)) == 1:
            self.neck = SimpleFeaturePyramid(channels[-1], strides[-1])
            channels, strides = self.neck.channels, self.neck.strides
        self.decode_head: Any = build(head, channels, strides, num_classes, **head_options)
        self.auxiliary_index = max(len(channels) - 2, 0)
        self.auxiliary_head: Any = None
        if auxiliary:
            i = self.auxiliary_index
            self.auxiliary_head = build("fcn", channels[i : i + 1], strides[i : i + 1], num_classes)
        self.stride: int = self.decode_head.stride

        read = set(self.decode_head.in_indices) | ({self.auxiliary_index} if auxiliary else set())
        read = {last} if self.neck is not None else read
        self.norms = nn.ModuleList(
            LayerNorm2d(row["num_chs"]) if i in read and not row.get("normed") else nn.Identity()
            for i, row in enumerate(rows)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, num_classes, ceil(H / stride), ceil(W / stride)).

        Raises:
            VizattnError: images larger than the one size that the backbone takes.
        """
        return self._cut(self.decode_head(self.forward_features(images)), images)

    def forward_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) -> the logits, and those of the auxiliary head on its own grid or None without one."""
        maps = self.forward_features(images)
        logits = self._cut(self.decode_head(maps), images)
        if self.auxiliary_head is None:
            return logits, None
        auxiliary = self.auxiliary_head([maps[self.auxiliary_index]])
        return logits, self._cut(auxiliary, images, self.auxiliary_head.stride)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> the maps that the heads read, finest first; those that none reads are not normed."""
        maps = self.backbone(self._padded(images))
        maps = list(maps.values()) if isinstance(maps, dict) else maps
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        if self.neck is not None:
            return self.neck(self.norms[-1](maps[-1]))
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

    def head_state(self) -> dict[str, Tensor]:
        """The state of everything but the backbone."""
        return {name: x for name, x in self.state_dict().items() if not name.startswith("backbone.")}

    def _padded(self, images: Tensor) -> Tensor:
        """Images as large as the backbone wants them, with zeros, the mean colour, on the right and below."""
        height, width = images.shape[-2:]
        if self.fixed_size is not None:
            down, right = self.fixed_size[0] - height, self.fixed_size[1] - width
            if down < 0 or right < 0:
                raise VizattnError(
                    f"This backbone takes images of {self.fixed_size[0]}x{self.fixed_size[1]} pixels, got "
                    f"{height}x{width}. Predict with sliding windows (mode='slide', crop_size={self.fixed_size}), or "
                    "create the backbone with img_size=(height, width), or for any size with dynamic_img_size=True "
                    "(ViT) or strict_img_size=False (Swin)."
                )
        else:
            down, right = -height % self.divisor, -width % self.divisor
        return F.pad(images, (0, right, 0, down)) if down or right else images

    def _cut(self, logits: Tensor, images: Tensor, stride: int | None = None) -> Tensor:
        """Logits without those that lie beyond the image."""
        stride = stride or self.stride
        height, width = images.shape[-2:]
        return logits[..., : -(-height // stride), : -(-width // stride)]


def _feature_rows(backbone: nn.Module) -> list[dict[str, Any]]:
    """A row of `feature_info` for each map that the backbone gives."""
    info: Any = getattr(backbone, "feature_info", None)
    if not hasattr(info, "get_dicts"):
        raise VizattnError(
            f"A segmenter reads the maps of a backbone, and {type(backbone).__name__} gives none: create it with "
            "timm.create_model(name, features_only=True)."
        )
    return info.get_dicts()


def _input_limits(backbone: nn.Module, strides: list[int]) -> tuple[tuple[int, int] | None, int]:
    """The one image size that a backbone takes, if it is so, and what the sides of images must be multiples of."""
    if any(type(module).__module__.startswith("vizattn.models.") for module in backbone.modules()):
        return None, 1  # they pad, and keep the padding out of their attention
    for module in backbone.modules():
        if isinstance(module, PatchEmbed):
            size = module.img_size if module.strict_img_size else None
            return size, max(module.patch_size)
    return None, max(strides)

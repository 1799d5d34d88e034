"""Segmentation: heads that read the maps of a backbone, and the `Segmenter` that joins the two.

A head is ``Head(channels, strides, num_classes, **options)``; channels and strides are those of the maps it is given,
finest first. ``forward(maps)`` gives logits (B, num_classes, h, w). Attributes: `stride`, pixels of the image a logit;
`in_indices`, the maps it reads; `pyramid`, whether it is made for maps of different strides.
"""

from vizattn.heads.build import HEADS, build
from vizattn.heads.segmenter import Segmenter
from vizattn.heads.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["HEADS", "Segmenter", "SimpleFeaturePyramid", "build"]

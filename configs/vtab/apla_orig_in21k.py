"""Transfer by attention projection layer adaptation, ViT-B/16 (the original weights, ImageNet-21k).

vizattn vtab run --adapter vtab/apla_orig_in21k --root DATA
Published: arXiv:2503.11335 reports 46 data sets, and no mean for VTAB-1k that is known here.
"""

_base_ = ["apla.py"]
model = dict(name="vit_base_patch16_224.orig_in21k", pretrained=True)

"""Transfer by efficient probing of frozen tokens, ViT-B/16 (the original weights, ImageNet-21k).

vizattn vtab run --adapter vtab/efficient_probing_orig_in21k --root DATA
Published: no figures for VTAB-1k (arXiv:2506.10178 measures ImageNet-1k, Food-101 and others). 32 queries as there;
AdamW in the place of LARS with batches of 4,096, which 1,000 images do not fill.
"""

_base_ = ["efficient_probing.py"]
model = dict(name="vit_base_patch16_224.orig_in21k", pretrained=True)

"""Transfer by full fine-tuning, ViT-B/16 (the original weights, ImageNet-21k).

vizattn vtab run --adapter vtab/full_orig_in21k --root DATA
Published (arXiv:2203.12119): natural 75.9, specialized 83.4, structured 47.6; mean-3 69.0, mean-19 65.6; again
without choosing by test accuracy, mean-3 74.2.
"""

_base_ = ["full.py"]
model = dict(name="vit_base_patch16_224.orig_in21k", pretrained=True)

"""Transfer by hierarchical side-tuning, ViT-B/16 (the original weights, ImageNet-21k).

vizattn vtab run --adapter vtab/hst_orig_in21k --root DATA
Published (arXiv:2310.05393, with the augreg weights): natural 82.8, specialized 87.1, structured 64.5; mean-3 78.1,
mean-19 76.0. AdamW with learning rates 1e-3 to 1e-2 and weight decays 5e-5 to 5e-2, as there.
"""

_base_ = ["hst.py"]
model = dict(name="vit_base_patch16_224.orig_in21k", pretrained=True)

"""Transfer by a linear probe on frozen features, ViT-B/16 (the original weights, ImageNet-21k).

vizattn vtab run --adapter vtab/linear_probe_orig_in21k --root DATA
Published (arXiv:2203.12119): natural 68.9, specialized 77.2, structured 26.9; mean-3 57.6, mean-19 52.9. Its
optimizer, schedule and grid, for batches of 64.
"""

_base_ = ["linear_probe.py"]
model = dict(name="vit_base_patch16_224.orig_in21k", pretrained=True)

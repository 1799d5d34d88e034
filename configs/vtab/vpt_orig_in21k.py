"""Transfer by Visual Prompt Tuning, deep, ViT-B/16 (the original weights, ImageNet-21k).

vizattn vtab run --adapter vtab/vpt_orig_in21k --root DATA
Published (arXiv:2203.12119): natural 78.5, specialized 82.4, structured 55.0; mean-3 72.0, mean-19 69.4; again
without choosing by test accuracy, mean-3 76.4. Its optimizer and schedule, and its grid for batches of 64; it also
chooses the number of prompts of each task from 1, 5, 10, 50, 100, 200: add --sweep for that.
"""

_base_ = ["vpt.py"]
model = dict(name="vit_base_patch16_224.orig_in21k", pretrained=True)

"""Transfer by full fine-tuning, ViT-B/16 (augreg, ImageNet-21k).

vizattn vtab run --adapter full --root DATA
Published (arXiv:2203.12119, other weights of ImageNet-21k): natural 75.9, specialized 83.4, structured 47.6; mean-3
69.0, mean-19 65.6; again without choosing by test accuracy, mean-3 74.2.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="full")
optimizer = dict(name="adamw", lr=1e-4, weight_decay=1e-4)
sweep = {"optimizer.lr": [1e-3, 3e-4, 1e-4, 3e-5, 1e-5], "optimizer.weight_decay": [1e-2, 1e-4]}

"""Transfer by side-tuning, ViT-B/16 (augreg, ImageNet-21k): the plain baseline of a small network beside the backbone.

vizattn vtab run --adapter side_tuning --root DATA
Published (arXiv:2203.12119, its own side network and weights): natural 58.2, specialized 68.1, structured 23.4.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="side_tuning")
optimizer = dict(name="adamw", lr=1e-3, weight_decay=1e-4)
sweep = {"optimizer.lr": [1e-2, 3e-3, 1e-3, 3e-4], "optimizer.weight_decay": [1e-2, 1e-4]}

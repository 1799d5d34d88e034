"""Transfer by hierarchical side-tuning, ViT-B/16 (augreg, ImageNet-21k), mean and standard deviation 0.5.

vizattn vtab run --adapter hst --root DATA
Published (arXiv:2310.05393): natural 82.8, specialized 87.1, structured 64.5; mean-3 78.1, mean-19 76.0. AdamW with
learning rates 1e-3 to 1e-2 and weight decays 5e-5 to 5e-2, as there.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="hst")
optimizer = dict(name="adamw", lr=5e-3, weight_decay=5e-3)
sweep = {"optimizer.lr": [1e-2, 5e-3, 2e-3, 1e-3], "optimizer.weight_decay": [5e-2, 5e-3, 5e-4, 5e-5]}

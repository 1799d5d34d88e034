"""Transfer by attention projection layer adaptation, ViT-B/16 (augreg, ImageNet-21k).

vizattn vtab run --adapter apla --root DATA
Published: arXiv:2503.11335 reports 46 data sets, and no mean for VTAB-1k that is known here.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="apla", num_rows=128)
optimizer = dict(name="adamw", lr=1e-3, weight_decay=1e-4, clip_grad=1.0)
sweep = {"optimizer.lr": [3e-3, 1e-3, 3e-4, 1e-4, 3e-5], "optimizer.weight_decay": [1e-2, 1e-4]}

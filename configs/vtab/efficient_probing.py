"""Transfer by efficient probing of frozen tokens, ViT-B/16 (augreg, ImageNet-21k).

vizattn vtab run --adapter efficient_probing --root DATA
Published: no figures for VTAB-1k (arXiv:2506.10178 measures ImageNet-1k, Food-101 and others). 32 queries as there;
AdamW in the place of LARS with batches of 4,096, which 1,000 images do not fill.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="efficient_probing", num_queries=32)
optimizer = dict(name="adamw", lr=1e-3, weight_decay=1e-4)
sweep = {
    "optimizer.lr": [3e-2, 1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4, 3e-4, 1e-4, 3e-5],
    "optimizer.weight_decay": [1e-1, 1e-2, 1e-4, 0.0],
}

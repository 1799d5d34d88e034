"""VTAB-mini by efficient probing of frozen tokens of vit_va_nano_patch4_32.

vizattn vtab run --suite vtab-mini --adapter efficient_probing
"""

_base_ = ["_mini.py"]
adapter = dict(method="efficient_probing", num_queries=4)
optimizer = dict(name="adamw", lr=3e-3, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=20, warmup_epochs=2)
sweep = {
    "optimizer.lr": [1e-1, 5e-2, 3e-2, 2e-2, 1e-2, 5e-3, 3e-3, 2e-3, 1e-3, 5e-4],
    "optimizer.weight_decay": [1e-1, 1e-2, 1e-4, 0.0],
}

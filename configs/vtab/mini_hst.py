"""VTAB-mini by hierarchical side-tuning of vit_va_nano_patch4_32.

vizattn vtab run --suite vtab-mini --adapter hst
"""

_base_ = ["_mini.py"]
adapter = dict(method="hst", widths=(16, 24, 32, 48), num_heads=(2, 3, 4, 6))
optimizer = dict(name="adamw", lr=6e-3, weight_decay=1e-2)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

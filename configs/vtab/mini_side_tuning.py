"""VTAB-mini by side-tuning of vit_va_nano_patch4_32.

vizattn vtab run --suite vtab-mini --adapter side_tuning
"""

_base_ = ["_mini.py"]
adapter = dict(method="side_tuning")
optimizer = dict(name="adamw", lr=3e-3, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

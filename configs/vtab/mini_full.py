"""VTAB-mini by full fine-tuning of vit_va_nano_patch4_32.

vizattn vtab run --suite vtab-mini --adapter full
"""

_base_ = ["_mini.py"]
adapter = dict(method="full")
optimizer = dict(name="adamw", lr=5e-4, weight_decay=5e-2)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

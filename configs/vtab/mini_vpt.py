"""VTAB-mini by Visual Prompt Tuning, deep of vit_va_nano_patch4_32.

vizattn vtab run --suite vtab-mini --adapter vpt
"""

_base_ = ["_mini.py"]
adapter = dict(method="vpt", num_tokens=16)
optimizer = dict(name="adamw", lr=1e-2, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

"""Hierarchical side-tuning: a small pyramid reads every block.

vizattn train classification/digits_hst
Expected: the row of hst in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="hst", widths=(16, 24, 32, 48), num_heads=(2, 3, 4, 6))
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=6e-3, weight_decay=1e-2)
schedule = dict(name="cosine", epochs=6, warmup_epochs=1)

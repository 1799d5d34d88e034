"""APLA: 32 of the 96 rows of every attention's output projection.

vizattn train classification/digits_apla
Expected: the row of apla in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="apla", num_rows=32)
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=3e-3, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=6, warmup_epochs=1)

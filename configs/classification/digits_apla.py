"""APLA: 32 of the 96 rows of every attention's output projection.

vizattn train classification/digits_apla
Expected: test accuracy EXPECTED_apla.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="apla", num_rows=32)
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=3e-3, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

"""Efficient probing: eight queries pool the frozen tokens, from stored features.

vizattn train classification/digits_efficient_probing
Expected: the row of efficient_probing in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="efficient_probing", num_queries=8)
data = dict(name="digits", batch_size=32)
optimizer = dict(name="adamw", lr=3e-3, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=40, warmup_epochs=2)

"""Linear probe: the classifier alone is trained, on stored features.

vizattn train classification/digits_linear_probe
Expected: the row of linear_probe in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="linear_probe")
data = dict(name="digits", batch_size=32)
optimizer = dict(name="adamw", lr=1e-2, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=40, warmup_epochs=2)

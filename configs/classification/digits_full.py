"""Full fine-tuning: every weight of the pretrained backbone is trained.

vizattn train classification/digits_full
Expected: the row of full in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="full")
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=5e-4, weight_decay=5e-2)
schedule = dict(name="cosine", epochs=6, warmup_epochs=1)

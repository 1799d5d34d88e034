"""The control: the same architecture from random weights, with the budget of full fine-tuning.

vizattn train classification/digits_scratch
Expected: the row of scratch in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=False)
adapter = dict(method="full")
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=1e-3, weight_decay=5e-2)
schedule = dict(name="cosine", epochs=6, warmup_epochs=1)

"""Visual Prompt Tuning, deep: sixteen prompts at every block.

vizattn train classification/digits_vpt
Expected: the row of vpt in the table of README.md, which `make demo` measures with three seeds.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="vpt", num_tokens=16)
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=1e-2, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

"""Visual Prompt Tuning, deep: sixteen prompts at every block.

vizattn train classification/digits_vpt
Expected: test accuracy EXPECTED_vpt.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="vpt", num_tokens=16)
data = dict(name="digits", batch_size=16)
optimizer = dict(name="adamw", lr=2e-2, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=8, warmup_epochs=1)

"""Visual Prompt Tuning, deep: eight prompts at every block.

vizattn train classification/digits_vpt
Expected: test accuracy EXPECTED_vpt.
"""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="vpt", num_tokens=8)
data = dict(name="digits", batch_size=32)
optimizer = dict(name="adamw", lr=1e-2, weight_decay=1e-4)
schedule = dict(name="cosine", epochs=12, warmup_epochs=2)

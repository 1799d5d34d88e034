"""Drawn scenes by deep prompts and a linear head on the frozen vit_va_nano_patch4_32.

vizattn train segmentation/scenes_vit_vpt
Expected: mIoU 16.5 % on `val`, 16.5 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="vpt", num_tokens=16)
head = dict(_delete_=True, name="linear")

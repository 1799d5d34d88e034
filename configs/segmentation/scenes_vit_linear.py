"""Drawn scenes by a linear head on the frozen maps of vit_va_nano_patch4_32.

vizattn train segmentation/scenes_vit_linear
Expected: mIoU 15.3 % on `val`, 15.6 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="linear_probe")
head = dict(_delete_=True, name="linear")

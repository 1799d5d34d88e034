"""Drawn scenes by the side pyramid of hierarchical side-tuning, beside the frozen vit_va_nano_patch4_32.

vizattn train segmentation/scenes_vit_hst
Expected: mIoU 36.2 % on `val`, 36.9 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="hst")

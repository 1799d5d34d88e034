"""Drawn scenes by attention projections and a linear head on the otherwise frozen vit_va_nano_patch4_32.

vizattn train segmentation/scenes_vit_apla
Expected: mIoU 21.6 % on `val`, 21.4 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
adapter = dict(method="apla", num_rows=96)
head = dict(_delete_=True, name="linear")
optimizer = dict(lr=1e-3)

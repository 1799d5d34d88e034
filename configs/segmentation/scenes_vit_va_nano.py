"""SemanticFPN on vit_va_nano_patch4_32, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_vit_va_nano
Expected: mIoU 48.0 % on `val`, 50.2 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
optimizer = dict(lr=5e-4)

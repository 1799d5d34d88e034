"""SemanticFPN on halonet_va_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_halonet_va_nano
Expected: mIoU 58.5 % on `val`, 58.8 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="halonet_va_nano", pretrained=True)
optimizer = dict(lr=5e-4)

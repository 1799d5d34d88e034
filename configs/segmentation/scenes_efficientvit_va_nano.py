"""SemanticFPN on efficientvit_va_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_efficientvit_va_nano
Expected: mIoU 78.4 % on `val`, 77.6 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="efficientvit_va_nano", pretrained=True)

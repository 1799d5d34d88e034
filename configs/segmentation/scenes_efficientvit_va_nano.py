"""SemanticFPN on efficientvit_va_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_efficientvit_va_nano
Expected: mIoU 77.5 % on `val`, 78.0 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="efficientvit_va_nano", pretrained=True)

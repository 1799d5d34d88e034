"""SemanticFPN on efficientvit_va_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_efficientvit_va_nano
Expected: not measured yet.
"""

_base_ = ["_scenes.py"]
model = dict(name="efficientvit_va_nano", pretrained=True)

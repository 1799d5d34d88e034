"""SemanticFPN on vit_va_nano_patch4_32, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_vit_va_nano
Expected: not measured yet.
"""

_base_ = ["_scenes.py"]
model = dict(name="vit_va_nano_patch4_32", pretrained=True)

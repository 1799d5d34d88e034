"""SemanticFPN on l2vit_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_l2vit_nano
Expected: not measured yet.
"""

_base_ = ["_scenes.py"]
model = dict(name="l2vit_nano", pretrained=True)

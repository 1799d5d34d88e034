"""SemanticFPN on nat_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_nat_nano
Expected: not measured yet.
"""

_base_ = ["_scenes.py"]
model = dict(name="nat_nano", pretrained=True)

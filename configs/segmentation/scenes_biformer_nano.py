"""SemanticFPN on biformer_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_biformer_nano
Expected: not measured yet.
"""

_base_ = ["_scenes.py"]
model = dict(name="biformer_nano", pretrained=True)

"""SemanticFPN on biformer_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_biformer_nano
Expected: mIoU 71.2 % on `val`, 69.8 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="biformer_nano", pretrained=True)
optimizer = dict(lr=5e-4)

"""SemanticFPN on nat_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_nat_nano
Expected: mIoU 64.8 % on `val`, 66.5 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="nat_nano", pretrained=True)
optimizer = dict(lr=5e-4)

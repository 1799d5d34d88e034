"""SemanticFPN on l2vit_nano, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_l2vit_nano
Expected: mIoU 60.9 % on `val`, 59.9 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="l2vit_nano", pretrained=True)
optimizer = dict(lr=5e-4)

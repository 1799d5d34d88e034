"""SemanticFPN on deit_agent_nano_patch4_32, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_deit_agent_nano
Expected: mIoU 72.0 % on `val`, 71.5 % on `test`, whose letters are of other fonts.
"""

_base_ = ["_scenes.py"]
model = dict(name="deit_agent_nano_patch4_32", pretrained=True)
optimizer = dict(lr=5e-4)

"""SemanticFPN on deit_agent_nano_patch4_32, pretrained on letters, all of it trained on drawn scenes.

vizattn train segmentation/scenes_deit_agent_nano
Expected: not measured yet.
"""

_base_ = ["_scenes.py"]
model = dict(name="deit_agent_nano_patch4_32", pretrained=True)

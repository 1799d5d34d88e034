"""SemanticFPN on agent_pvt_medium, ADE20K.

vizattn train segmentation/semantic_fpn_agent_pvt_medium --data ADEChallengeData2016
Published (arXiv:2312.08874): mIoU 44.3 at one scale. Not measured here.
"""

_base_ = ["_ade20k_semantic_fpn.py"]
model = dict(name="agent_pvt_medium", pretrained=True, drop_path_rate=0.1)

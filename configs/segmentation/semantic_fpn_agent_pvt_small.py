"""SemanticFPN on agent_pvt_small, ADE20K.

vizattn train segmentation/semantic_fpn_agent_pvt_small --data ADEChallengeData2016
Published (arXiv:2312.08874): mIoU 44.18 at one scale. Not measured here.
"""

_base_ = ["_ade20k_semantic_fpn.py"]
model = dict(name="agent_pvt_small", pretrained=True, drop_path_rate=0.1)

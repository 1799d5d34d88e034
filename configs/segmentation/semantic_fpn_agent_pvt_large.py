"""SemanticFPN on agent_pvt_large, ADE20K.

vizattn train segmentation/semantic_fpn_agent_pvt_large --data ADEChallengeData2016
Published (arXiv:2312.08874): mIoU 46.52 at one scale. Not measured here.
"""

_base_ = ["_ade20k_semantic_fpn.py"]
model = dict(name="agent_pvt_large", pretrained=True, drop_path_rate=0.1)

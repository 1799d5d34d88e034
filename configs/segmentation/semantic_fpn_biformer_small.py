"""SemanticFPN on biformer_small, ADE20K, regions of 1/8 of each side.

vizattn train segmentation/semantic_fpn_biformer_small --data ADEChallengeData2016
Published (arXiv:2303.08810): mIoU 48.9 at one scale. Not measured here.
"""

_base_ = ["_ade20k_semantic_fpn.py"]
model = dict(name="biformer_small", pretrained=True, n_win=8, drop_path_rate=0.2)

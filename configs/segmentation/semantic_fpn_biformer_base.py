"""SemanticFPN on biformer_base, ADE20K, regions of 1/8 of each side.

vizattn train segmentation/semantic_fpn_biformer_base --data ADEChallengeData2016
Published (arXiv:2303.08810): mIoU 49.9 at one scale. Not measured here.
"""

_base_ = ["_ade20k_semantic_fpn.py"]
model = dict(name="biformer_base", pretrained=True, n_win=8, drop_path_rate=0.4)

"""UPerNet on biformer_small, ADE20K, regions of 1/8 of each side.

vizattn train segmentation/upernet_biformer_small --data ADEChallengeData2016
Published (arXiv:2303.08810): mIoU 49.8 at one scale, 50.8 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="biformer_small", pretrained=True, n_win=8, drop_path_rate=0.2)

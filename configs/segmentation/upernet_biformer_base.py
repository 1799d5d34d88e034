"""UPerNet on biformer_base, ADE20K, regions of 1/8 of each side.

vizattn train segmentation/upernet_biformer_base --data ADEChallengeData2016
Published (arXiv:2303.08810): mIoU 51.0 at one scale, 51.7 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="biformer_base", pretrained=True, n_win=8, drop_path_rate=0.4)

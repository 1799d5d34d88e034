"""UPerNet on nat_small, ADE20K.

vizattn train segmentation/upernet_nat_small --data ADEChallengeData2016
Published (arXiv:2204.07143): mIoU 48.0 at one scale, 49.5 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="nat_small", pretrained=True, drop_path_rate=0.3)

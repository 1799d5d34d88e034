"""UPerNet on nat_base, ADE20K.

vizattn train segmentation/upernet_nat_base --data ADEChallengeData2016
Published (arXiv:2204.07143): mIoU 48.5 at one scale, 49.7 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="nat_base", pretrained=True, drop_path_rate=0.5)

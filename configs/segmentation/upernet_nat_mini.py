"""UPerNet on nat_mini, ADE20K.

vizattn train segmentation/upernet_nat_mini --data ADEChallengeData2016
Published (arXiv:2204.07143): mIoU 45.1 at one scale, 46.4 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="nat_mini", pretrained=True, drop_path_rate=0.2)

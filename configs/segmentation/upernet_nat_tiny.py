"""UPerNet on nat_tiny, ADE20K.

vizattn train segmentation/upernet_nat_tiny --data ADEChallengeData2016
Published (arXiv:2204.07143): mIoU 47.1 at one scale, 48.4 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="nat_tiny", pretrained=True, drop_path_rate=0.2)

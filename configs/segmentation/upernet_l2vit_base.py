"""UPerNet on l2vit_base, ADE20K.

vizattn train segmentation/upernet_l2vit_base --data ADEChallengeData2016
The published figure is not recorded in this project. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="l2vit_base", pretrained=True, drop_path_rate=0.4)

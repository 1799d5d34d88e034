"""UPerNet on dinat_small, ADE20K; dilations up to 16, 8, 4 and 2 fit crops of 512.

vizattn train segmentation/upernet_dinat_small --data ADEChallengeData2016
Published (arXiv:2209.15001): mIoU 48.9 at one scale, 49.9 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="dinat_small", pretrained=True, dilations=[16, 8, 4, 2], drop_path_rate=0.3)

"""UPerNet on dinat_large, ADE20K; dilations up to 16, 8, 4 and 2 fit crops of 512.

vizattn train segmentation/upernet_dinat_large --data ADEChallengeData2016
Published (arXiv:2209.15001): mIoU 54.0 at one scale, 54.9 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="dinat_large", pretrained=True, dilations=[16, 8, 4, 2], drop_path_rate=0.35)

"""UPerNet on dinat_tiny, ADE20K; dilations up to 16, 8, 4 and 2 fit crops of 512.

vizattn train segmentation/upernet_dinat_tiny --data ADEChallengeData2016
Published (arXiv:2209.15001): mIoU 47.8 at one scale, 48.8 at several. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="dinat_tiny", pretrained=True, dilations=[16, 8, 4, 2], drop_path_rate=0.2)

"""UPerNet on biformer_tiny, ADE20K, regions of 1/8 of each side.

vizattn train segmentation/upernet_biformer_tiny --data ADEChallengeData2016
No figure was published for this size. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="biformer_tiny", pretrained=True, n_win=8, drop_path_rate=0.1)

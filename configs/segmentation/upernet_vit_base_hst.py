"""UPerNet on the side pyramid of hierarchical side-tuning, ViT-B/16 frozen, ADE20K.

vizattn train segmentation/upernet_vit_base_hst --data ADEChallengeData2016
Published (arXiv:2310.05393): mIoU 47.5 at several scales. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="vit_base_patch16_224.augreg_in21k", pretrained=True, img_size=512)
adapter = dict(method="hst", widths=[64, 128, 256, 384])

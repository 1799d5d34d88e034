"""SETR-PUP on a ViT-L/16 whose attention projections train, ADE20K.

vizattn train segmentation/setr_pup_vit_large_apla --data ADEChallengeData2016
The published figure (arXiv:2503.11335) is not recorded in this project. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="vit_large_patch16_224.augreg_in21k", pretrained=True, img_size=512)
adapter = dict(method="apla", num_rows=1024)
head = dict(_delete_=True, name="setr_pup")
optimizer = dict(lr=1e-3, weight_decay=0.0, head_lr_mult=10.0)

"""SETR-PUP on a frozen ViT-L/16 with deep prompts, ADE20K.

vizattn train segmentation/setr_pup_vit_large_vpt --data ADEChallengeData2016
Published (arXiv:2203.12119): mIoU 42.11; the head alone 35.12, full fine-tuning 48.31. Not measured here.
"""

_base_ = ["_ade20k_upernet.py"]
model = dict(name="vit_large_patch16_224.augreg_in21k", pretrained=True, img_size=512)
adapter = dict(method="vpt", num_tokens=100)
head = dict(_delete_=True, name="setr_pup")
optimizer = dict(lr=1e-3, weight_decay=1e-4, head_lr_mult=10.0)

"""What the SemanticFPN recipes on ADE20K share: 80,000 iterations of 16 images of 512 x 512 (arXiv:2102.12122).

An epoch is 1,264 iterations of the 20,210 training images.
Stochastic depth, which each recipe sets, is a choice made here.
"""

task = "segmentation"
head = dict(name="semantic_fpn")
data = dict(
    name="segmentation_folder",
    root="data/ADEChallengeData2016",
    layout="ade20k",
    reduce_zero_label=True,
    batch_size=16,
    num_workers=8,
    augment="standard",
    crop_size=512,
    short_side=512,
)
optimizer = dict(name="adamw", lr=1e-4, weight_decay=1e-4)
schedule = dict(name="poly", epochs=64, power=0.9)
validation = dict(interval_epochs=8)
checkpoint = dict(interval_epochs=8)
logging = dict(interval=50)
seed = 0

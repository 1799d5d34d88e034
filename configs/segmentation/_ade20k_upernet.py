"""What the UPerNet recipes on ADE20K share: the usual 160,000 iterations of 16 images of 512 x 512 (arXiv:2103.14030).

An epoch is 1,264 iterations of the 20,210 training images.
Stochastic depth, which each recipe sets, is a choice made here.
"""

task = "segmentation"
head = dict(name="upernet", dim=512, auxiliary=True)
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
optimizer = dict(name="adamw", lr=6e-5, weight_decay=0.01)
schedule = dict(name="poly", epochs=127, warmup_epochs=1.2, power=1.0)
loss = dict(auxiliary=0.4)
validation = dict(interval_epochs=13)
checkpoint = dict(interval_epochs=13)
logging = dict(interval=50)
seed = 0

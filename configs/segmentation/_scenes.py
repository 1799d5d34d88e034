"""What the recipes on drawn scenes share: 64 x 64 pictures with seven kinds of shapes, new ones in each epoch."""

task = "segmentation"
head = dict(name="semantic_fpn", fpn_dim=64, dim=64)
data = dict(name="scenes", batch_size=16, num_workers=0, augment="none")
optimizer = dict(name="adamw", lr=2e-3, weight_decay=0.01, clip_grad=1.0)
schedule = dict(name="poly", epochs=2, warmup_epochs=0.2, power=0.9)
logging = dict(interval=25)
checkpoint = dict(interval_epochs=1, keep=1)
seed = 0

"""Pretraining of deit_agent_nano_patch4_32 from nothing, on letters drawn in the fonts of matplotlib and Pillow.

vizattn train classification/glyphs_deit_agent_nano
Sees 104,000 drawn letters once each, new ones in each epoch; took 12 minutes on one busy core.
Expected: accuracy 96.5 % on `val`, 95.7 % on `test`. `val` draws the training fonts again; `test` holds out the STIX
serif family and Pillow's default font. There are no digits in it.
"""

task = "classification"
model = dict(name="deit_agent_nano_patch4_32", pretrained=False)
adapter = None
# The drawing is the augmentation.
data = dict(name="glyphs", batch_size=64, num_workers=0, augment="none")
optimizer = dict(name="muon", lr=1.5e-3, weight_decay=0.05, clip_grad=1.0)
schedule = dict(name="cosine", epochs=2, warmup_epochs=0.3, min_lr=1e-6)
loss = dict(label_smoothing=0.1)
ema = dict(decay=0.998)
logging = dict(interval=50)
checkpoint = dict(interval_epochs=1, keep=1)
seed = 0

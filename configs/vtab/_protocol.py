"""What recipes for transfer share: images squashed to the input size, no augmentation, batches of 64, 100 epochs."""

task = "classification"
model = dict(name="vit_base_patch16_224.augreg_in21k", pretrained=True)
data = dict(name="transfer", batch_size=64, augment="none", resize="squash")
schedule = dict(name="cosine", epochs=100, warmup_epochs=10)

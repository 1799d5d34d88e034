"""What the recipes for VTAB-mini share: the backbone that comes with the package, and fewer epochs."""

task = "classification"
model = dict(name="vit_va_nano_patch4_32", pretrained=True)
data = dict(name="transfer", batch_size=64, augment="none", resize="squash")

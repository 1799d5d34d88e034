"""Transfer by a linear probe on frozen features, ViT-B/16 (augreg, ImageNet-21k).

vizattn vtab run --adapter linear_probe --root DATA
Published (arXiv:2203.12119, other weights of ImageNet-21k): natural 68.9, specialized 77.2, structured 26.9; mean-3
57.6, mean-19 52.9. Its optimizer, schedule and grid, for batches of 64.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="linear_probe")
optimizer = dict(name="momentum", lr=2.5, momentum=0.9, weight_decay=1e-4)
sweep = {
    "optimizer.lr": [12.5, 6.25, 2.5, 1.25, 0.625, 0.25, 0.125, 0.0625, 0.025, 0.0125],
    "optimizer.weight_decay": [1e-2, 1e-3, 1e-4, 0.0],
}

"""Transfer by Visual Prompt Tuning, deep, ViT-B/16 (augreg, ImageNet-21k).

vizattn vtab run --adapter vpt --root DATA
Published (arXiv:2203.12119, other weights of ImageNet-21k): natural 78.5, specialized 82.4, structured 55.0; mean-3
72.0, mean-19 69.4; again without choosing by test accuracy, mean-3 76.4. Its optimizer and schedule, and its grid for
batches of 64; it also chooses the number of prompts of each task from 1, 5, 10, 50, 100, 200: add --sweep for that.
"""

_base_ = ["_protocol.py"]
adapter = dict(method="vpt", num_tokens=50, dropout=0.1)
optimizer = dict(name="momentum", lr=1.25, momentum=0.9, weight_decay=1e-4)
sweep = {
    "optimizer.lr": [12.5, 6.25, 2.5, 1.25, 0.625, 0.25, 0.125, 0.0625, 0.025, 0.0125],
    "optimizer.weight_decay": [1e-2, 1e-3, 1e-4, 0.0],
}

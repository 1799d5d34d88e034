"""One diagram for each adapter: a transformer with what is frozen, what is trained, and what is added."""

from __future__ import annotations

from collections.abc import Collection

from picture import FROZEN, PLAIN, TRAINED, Picture

__all__ = ["adapter_pictures"]

X, WIDE = 138, 152  # the middle and the width of the boxes of the backbone
NORM1, QKV, SOFTMAX, PROJ, ADD1, NORM2, MLP, ADD2 = 102, 140, 178, 216, 250, 284, 322, 358
TOP, BOTTOM = 74, 384
FULL = ("patches", "norm1", "qkv", "proj", "norm2", "mlp", "norm", "head")


def _block(picture: Picture, trained: Collection[str]) -> None:
    """The backbone up to its last block."""

    def part(y: float, name: str, label: str) -> None:
        picture.box(X, y, WIDE, 26, label, TRAINED if name in trained else FROZEN)

    picture.text(X, 12, "image")
    picture.line((X, 20), (X, 29))
    part(43, "patches", "patch embedding")
    picture.frame(20, TOP, 2 * (X - 20), BOTTOM - TOP)
    picture.text(2 * X - 30, BOTTOM - 12, "L blocks", anchor="end", size=12)
    for start, end in ((56, NORM1 - 13), (NORM1 + 13, QKV - 13), (QKV + 13, SOFTMAX - 13), (SOFTMAX + 13, PROJ - 13)):
        picture.line((X, start), (X, end))
    part(NORM1, "norm1", "norm")
    part(QKV, "qkv", "queries, keys, values")
    picture.box(X, SOFTMAX, WIDE, 26, "attention", PLAIN)
    part(PROJ, "proj", "output projection")
    picture.line((X, PROJ + 13), (X, ADD1 - 8))
    picture.sum(X, ADD1)
    picture.line((X, ADD1 + 8), (X, NORM2 - 13))
    part(NORM2, "norm2", "norm")
    picture.line((X, NORM2 + 13), (X, MLP - 13))
    part(MLP, "mlp", "MLP")
    picture.line((X, MLP + 13), (X, ADD2 - 8))
    picture.sum(X, ADD2)
    left = X - WIDE / 2 - 18
    picture.line((X, 82), (left, 82), (left, ADD1), (X - 8, ADD1))
    picture.line((X, 268), (left, 268), (left, ADD2), (X - 8, ADD2))


def _end(picture: Picture, trained: Collection[str], pooled: bool = True) -> None:
    """From the last block to the classes; the norm and the pooling between may be somewhere else."""
    if pooled:
        picture.line((X, ADD2 + 8), (X, 401))
        picture.box(X, 414, WIDE, 26, "norm, pooling", TRAINED if "norm" in trained else FROZEN)
        picture.line((X, 427), (X, 439))
    picture.box(X, 452, WIDE, 26, "head", TRAINED)
    picture.line((X, 465), (X, 477))
    picture.text(X, 487, "classes")
    picture.legend(20, 518)


def _plain(title: str, trained: Collection[str]) -> Picture:
    picture = Picture(title, 276, 530)
    _block(picture, trained)
    _end(picture, trained)
    return picture


def _vpt() -> Picture:
    picture = Picture("VPT: prompts are further keys and values of the attention of every block", 480, 530)
    _block(picture, ())
    _end(picture, ())
    picture.box(370, NORM1, 156, 36, "prompts of this\nblock, (p, D)", TRAINED)
    picture.box(370, QKV + 14, 156, 36, "the block's own norm,\nkeys, values", FROZEN)
    picture.line((370, NORM1 + 18), (370, QKV - 4))
    picture.line((370, QKV + 32), (370, SOFTMAX + 8), (X + WIDE / 2, SOFTMAX + 8))
    picture.text(370, SOFTMAX + 30, "p more keys and values,\nthe same for all images", size=12)
    return picture


def _apla() -> Picture:
    picture = Picture("APLA: some rows of each attention's output projection are trained", 460, 530)
    _block(picture, ())
    _end(picture, ())
    left, top, cell = 310, 156, 12
    for i in range(10):
        kind = TRAINED if i in (1, 4, 5, 8) else FROZEN
        picture.box(left + 55, top + i * cell + cell / 2, 110, cell, kind=kind)
    picture.line((left - 8, PROJ), (X + WIDE / 2, PROJ), arrow=False, dashed=True)
    picture.text(left + 55, top - 28, "the projection's weight:\nr of its D rows, and their bias", size=12)
    return picture


def _efficient_probing() -> Picture:
    picture = Picture("Efficient probing: learnt queries pool the patch tokens of the last block", 460, 530)
    _block(picture, ())
    _end(picture, (), pooled=False)
    picture.box(370, 270, 152, 26, "Q queries", TRAINED)
    picture.box(370, 324, 152, 26, "softmax over tokens", PLAIN)
    picture.box(370, 366, 152, 26, "values W", TRAINED)
    picture.box(370, 408, 152, 26, "batch norm", FROZEN)
    picture.line((370, 283), (370, 311))
    picture.line((370, 337), (370, 353))
    picture.line((370, 379), (370, 395))
    picture.line((X, ADD2 + 8), (X, 396), (276, 396), (276, 324), (294, 324))
    picture.line((370, 421), (370, 452), (X + WIDE / 2, 452))
    picture.text(370, 238, "instead of the last\nnorm and the pooling", size=12)
    return picture


def _hst() -> Picture:
    picture = Picture("HST: a small pyramid beside the backbone reads every block", 490, 530)
    _block(picture, ("norm1", "norm2"))
    picture.line((X, ADD2 + 8), (X, 402))
    picture.text(X, 411, "next block", size=12)
    picture.text(X, 452, "the backbone's own end\nis not read", size=12)
    side = 376
    picture.box(side, 66, 152, 26, "meta-token", TRAINED)
    picture.line((300, 66), (X + 4, 66))
    picture.line((X + 8, ADD2), (276, ADD2), (276, 152), (300, 152))
    picture.box(side, 152, 152, 40, "bridge: meta-token,\npatch map to width C", TRAINED)
    picture.frame(284, 192, 196, 180)
    picture.text(294, 206, "side block", size=12, anchor="start")
    picture.line((side, 172), (side, 221))
    picture.box(side, 234, 140, 26, "attention to 2 keys", TRAINED)
    picture.line((side, 247), (side, 260))
    picture.sum(side, 268)
    picture.line((452, 152), (468, 152), (468, 268), (side + 8, 268))
    picture.text(side + 14, 256, "patch map", size=11, anchor="start")
    picture.line((side, 276), (side, 289))
    picture.box(side, 302, 140, 26, "MLP", TRAINED)
    picture.line((side, 315), (side, 328))
    picture.sum(side, 336)
    picture.line((side, 282), (294, 282), (294, 336), (side - 8, 336))
    picture.line((side, 344), (side, 401))
    picture.box(side, 414, 152, 26, "pooling, batch norm", FROZEN)
    picture.line((side, 427), (side, 439))
    picture.box(side, 452, 152, 26, "head", TRAINED)
    picture.line((side, 465), (side, 477))
    picture.text(side, 487, "classes")
    picture.legend(20, 518)
    return picture


def _side_tuning() -> Picture:
    picture = Picture("Side-tuning: frozen features and those of a small network, mixed by one number", 460, 566)
    _block(picture, ())
    picture.line((X, ADD2 + 8), (X, 401))
    picture.box(X, 414, WIDE, 26, "norm")
    picture.line((X, 427), (X, 446))
    picture.sum(X, 454)
    picture.line((X, 462), (X, 475))
    picture.box(X, 488, WIDE, 26, "pooling, head", TRAINED)
    picture.line((X, 501), (X, 513))
    picture.text(X, 523, "classes")
    picture.line((X + 26, 12), (370, 12), (370, 177))
    picture.box(370, 204, 140, 54, "small network:\nconvolutions, then\na linear layer", TRAINED)
    picture.line((370, 231), (370, 454), (X + 8, 454))
    picture.text(292, 443, "share 1 - sigmoid(a)", size=12)
    picture.text(X - 10, 440, "share sigmoid(a)", anchor="end", size=12)
    picture.legend(20, 554)
    return picture


def adapter_pictures() -> dict[str, Picture]:
    """A picture for each adapter, by its name."""
    return {
        "linear_probe": _plain("Linear probe: the head alone is trained", ()),
        "full": _plain("Full fine-tuning: everything is trained", FULL),
        "vpt": _vpt(),
        "apla": _apla(),
        "efficient_probing": _efficient_probing(),
        "hst": _hst(),
        "side_tuning": _side_tuning(),
    }

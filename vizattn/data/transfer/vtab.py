"""VTAB-1k (1910.04867): nineteen tasks of 800 training and 200 validation images, in the community's layout."""

from __future__ import annotations

from vizattn.data.transfer.tasks import Suite, TransferTask

__all__ = ["VTAB_1K"]

# Classes, accepted counts of test images, notes.
_TASKS: dict[str, dict[str, tuple[int, tuple[int, ...], str]]] = {
    "natural": {
        "cifar": (100, (10_000,), "CIFAR-100, fine labels"),
        "caltech101": (102, (6_084, 6_085), "one known copy has 6,085 test images"),
        "dtd": (47, (1_880,), ""),
        "oxford_flowers102": (102, (6_149,), ""),
        "oxford_iiit_pet": (37, (3_669,), ""),
        "svhn": (10, (26_032,), ""),
        "sun397": (397, (21_750,), ""),
    },
    "specialized": {
        "patch_camelyon": (2, (32_768,), ""),
        "eurosat": (10, (5_400,), ""),
        "resisc45": (45, (6_300,), ""),
        "diabetic_retinopathy": (5, (42_670,), ""),
    },
    "structured": {
        "clevr_count": (8, (15_000,), "number of objects, minus 3"),
        "clevr_dist": (6, (15_000,), "distance of the nearest object, thresholds 8, 8.5, 9, 9.5 and 10"),
        "dmlab": (6, (22_735,), ""),
        "kitti": (4, (711,), "distance of the nearest vehicle, thresholds 8 m and 20 m, or none"),
        "dsprites_loc": (16, (73_728,), "horizontal position, 32 values in 16 bins"),
        "dsprites_ori": (16, (73_728,), "orientation, 40 values in 16 bins"),
        "smallnorb_azi": (18, (12_150,), "azimuth"),
        "smallnorb_ele": (9, (12_150,), "elevation"),
    },
}

VTAB_1K = Suite(
    "vtab-1k",
    tuple(
        TransferTask(
            name,
            group,
            classes,
            layout="lists",
            splits={"train": (800,), "val": (200,), "trainval": (1_000,), "test": test},
            notes=notes,
        )
        for group, tasks in _TASKS.items()
        for name, (classes, test, notes) in tasks.items()
    ),
)

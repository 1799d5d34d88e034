"""What `vizattn predict` does with a segmentation model: a mask and an overlay for each image, and a legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["predict_masks", "refuse_overwriting", "unique_names"]


def predict_masks(trained: Any, images: Iterable[tuple[Path, str]], folder: Path, top_k: int) -> list[dict[str, Any]]:
    """Writes ``NAME.png`` (class numbers), ``NAME_overlay.png`` and ``legend.png`` to `folder`.

    Args:
        trained: What `load_trained` gives of a segmenter.
        images: Files, and the names of what is written for each.
        folder: Made if it is missing.
        top_k: Classes to report of each image.

    Returns:
        A dict an image: `image` and either `mask`, `overlay` and `predictions` (class, share of the pixels; largest
        first) or `error`.

    Raises:
        OSError: `folder` cannot be written to.
        VizattnError: The model came without its recipe, or with a damaged one.
    """
    import numpy as np
    from PIL import UnidentifiedImageError

    from vizattn.data.images import load_rgb
    from vizattn.data.masks import voc_palette
    from vizattn.engine.config import resolve_config
    from vizattn.engine.kinds import kind_of
    from vizattn.engine.pictures import index_image, legend, overlay, save_image, segment
    from vizattn.errors import VizattnError

    if trained.config is None:
        raise VizattnError("The segmenter came without the recipe it was trained by, which says how images are cut.")
    config = resolve_config(trained.config)
    kind, palette = kind_of(config), trained.palette or voc_palette(len(trained.class_names))
    task = kind.build_task(trained.model, config, len(trained.class_names), "images").eval()
    transform = kind.build_transform(trained.preprocessing, config["data"], False)
    folder.mkdir(parents=True, exist_ok=True)
    save_image(legend(trained.class_names, palette), folder / "legend.png")
    results: list[dict[str, Any]] = []
    for path, name in images:
        try:
            image = load_rgb(path)
        except OSError as error:
            why = "not an image file" if isinstance(error, UnidentifiedImageError) else str(error)
            results.append({"image": str(path), "error": why})
            continue
        mask = segment(task, transform, image)
        files = {"mask": folder / f"{name}.png", "overlay": folder / f"{name}_overlay.png"}
        save_image(index_image(mask, palette), files["mask"])
        save_image(overlay(image, mask, palette), files["overlay"])
        counts = np.bincount(mask.ravel(), minlength=len(palette)) / mask.size
        shares = [
            {"class": trained.class_names[c], "share": round(float(counts[c]), 6)}
            for c in np.argsort(-counts, kind="stable")[:top_k]
            if counts[c]
        ]
        results.append({"image": str(path), **{k: str(v) for k, v in files.items()}, "predictions": shares})
    return results


def refuse_overwriting(paths: Iterable[Path], names: Sequence[str], folder: Path) -> None:
    """Raise where what is written for the images, by `names` in `folder`, would take the place of one of them.

    Raises:
        VizattnError: It would.
    """
    from vizattn.errors import VizattnError

    given = {path.resolve() for path in paths}
    for name in ["legend", *names, *(f"{name}_overlay" for name in names)]:
        if (file := folder / f"{name}.png").resolve() in given:
            raise VizattnError(f"{file} is an image to segment and would be overwritten: choose another --masks DIR.")


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for the files of each image: that of the image, with its folders in front where two would be the same.

    Names that would still meet, also as "NAME_overlay" or "legend", are numbered.
    """
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 else "_".join([*path.parent.parts[-2:], path.stem]) for path in paths]
    names = [name.replace("/", "").replace("..", "") for name in names]
    taken, unique = {"legend"}, []
    for name in names:
        free, number = name, 1
        while taken & {free, f"{free}_overlay"}:
            number += 1
            free = f"{name}_{number}"
        taken |= {free, f"{free}_overlay"}
        unique.append(free)
    return unique

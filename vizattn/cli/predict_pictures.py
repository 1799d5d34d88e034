"""The pictures that `vizattn predict` writes: of a segmenter a mask and an overlay for each image, and a legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["predict_masks", "refuse_overwriting", "unique_names"]


def predict_masks(
    predictor: Any, images: Iterable[tuple[Path, str]], masks: Path, overlays: Path, top_k: int
) -> list[dict[str, Any]]:
    """Writes ``NAME.png`` (class numbers) and ``legend.png`` to `masks`, ``NAME_overlay.png`` to `overlays`.

    Args:
        predictor: A `Predictor` that segments.
        images: Files, and the names of what is written for each.
        masks: A folder, made if it is missing.
        overlays: Likewise.
        top_k: Classes to report of each image.

    Returns:
        A dict an image: `image` and either `mask`, `overlay` and `predictions` (class, share of the pixels; largest
        first) or `error`.

    Raises:
        OSError: A folder cannot be written to.
    """
    from vizattn.engine.pictures import index_image, legend, overlay, save_image
    from vizattn.engine.predict import FIRST_OF_SEVERAL, read_image
    from vizattn.errors import VizattnError

    masks.mkdir(parents=True, exist_ok=True)
    overlays.mkdir(parents=True, exist_ok=True)
    save_image(legend(predictor.class_names, predictor.palette), masks / "legend.png")
    results: list[dict[str, Any]] = []
    for path, name in images:
        try:
            image = read_image(path)
            mask, shares = predictor.segment(image, top_k)
        except (VizattnError, MemoryError) as error:
            results.append({"image": str(path), "error": str(error) or "there is not enough memory for it"})
            continue
        files = {"mask": masks / f"{name}.png", "overlay": overlays / f"{name}_overlay.png"}
        save_image(index_image(mask, predictor.palette), files["mask"])
        save_image(overlay(image, mask, predictor.palette), files["overlay"])
        result = {"image": str(path), **{k: str(v) for k, v in files.items()}, "predictions": shares}
        results.append(result | ({"note": FIRST_OF_SEVERAL} if image.info.get("first_of_several") else {}))
    return results


def refuse_overwriting(paths: Iterable[Path], names: Sequence[str], masks: Path | None, overlays: Path | None) -> None:
    """Raise where what is written for the images, by `names` in these folders, would take the place of one of them.

    Raises:
        VizattnError: It would.
    """
    from vizattn.errors import VizattnError

    given = {path.resolve() for path in paths}
    files = [masks / f"{name}.png" for name in ("legend", *names)] if masks else []
    files += [overlays / f"{name}_overlay.png" for name in names] if overlays else []
    for file in files:
        if file.resolve() in given:
            raise VizattnError(f"{file} is an image to predict and would be overwritten: choose another folder.")


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

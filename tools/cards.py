"""The card of a family, in the hub's layout: what cannot be derived comes from `model_cards/text/<family>.md`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from results import ROOT
from zoo import Backbone, Weights, markdown_table, module_docstring

from vizattn.weights import manifest

TEXT = ROOT / "model_cards" / "text"
NONE_STATED = "none stated"
DATASETS = {"in1k": "imagenet-1k", "in21k": "imagenet-21k", "in22k": "imagenet-21k"}
"""The hub's names of what the tags of weights say."""


def card(family: str, backbones: Sequence[Backbone]) -> str:
    """The whole card."""
    title, intro, sections = _text(family, backbones[0].name)
    weights = [each for backbone in backbones for each in backbone.weights]
    limits = sections.pop("Limits", "")
    prefixes = ", ".join(f"`{prefix}_*`" for prefix in _prefixes(backbones))
    parts = [
        f"---\n{_metadata(weights)}\n---",
        "<!-- Written by tools/make_cards.py from the registry, results.csv and "
        f"text/{family}.md: change those, then `make cards`. -->",
        f"# {title} ({prefixes})",
        intro,
        f"## Use\n\n{_usage(backbones)}",
        f"## Sizes\n\n{_sizes(backbones)}",
        f"## Weights and published accuracy\n\n{_weights(weights)}",
        f"## Measured here\n\n{_measured(backbones)}",
        *(f"## {heading}\n\n{body}" for heading, body in sections.items()),
        f"## Preprocessing\n\n{_preprocessing(weights)}",
        f"## Recipes\n\n{_recipes(backbones)}",
        f"## Limits\n\n{_limits(backbones, limits)}",
        f"## Licence\n\n{_licence(weights)}",
        f"## Citation\n\n{_citation(weights, intro)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(family: str, name: str) -> tuple[str, str, dict[str, str]]:
    """Title, introduction and sections by heading; of a family without such a text, its module's first paragraph."""
    path = TEXT / f"{family}.md"
    if not path.is_file():
        summary = module_docstring(name).split("\n\n")[0].replace("\n", " ")
        return summary.partition(":")[0].rstrip("."), f"{summary} `models/{family}.py`.", {}
    head, *rest = re.split(r"^## ", path.read_text(encoding="utf-8").strip(), flags=re.MULTILINE)
    title, _, intro = head.partition("\n")
    sections = {heading.strip(): body.strip() for heading, _, body in (part.partition("\n") for part in rest)}
    return title.removeprefix("# ").strip(), intro.strip(), sections


def _prefixes(backbones: Sequence[Backbone]) -> list[str]:
    """What the names begin with, before their size."""
    sizes = r"_(nano|mini|tiny|small|medium|base|large|stl|[hm]\d)(_.*)?$"
    return sorted({re.sub(sizes, "", backbone.name) for backbone in backbones}, key=lambda name: (len(name), name))


def _metadata(weights: Sequence[Weights]) -> str:
    """The hub's YAML."""
    tags = {part for each in weights for part in each.cfg.tag.split("_")}
    papers = sorted({each.cfg.paper_ids for each in weights if each.cfg.paper_ids})
    data = ModelCardData(
        **_hub_licence(weights),
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "vizattn", *(paper.lower() for paper in papers)],
        datasets=sorted({DATASETS[tag] for tag in tags if tag in DATASETS}) or None,
    )
    return data.to_yaml().strip()


def _hub_licence(weights: Sequence[Weights]) -> dict[str, Any]:
    """The licence of what was released, else of what is packaged; the hub has one, or a name for several."""
    weights = [each for each in weights if each.source == "released"] or weights
    names = sorted({each.licence for each in weights})
    if len(names) == 1 and names[0] != NONE_STATED:
        return {"license": names[0]}
    origin = next((each.cfg.origin_url for each in weights if each.cfg.origin_url), "")
    return {"license": "other", "license_name": "-and-".join(names).replace(" ", "-"), "license_link": origin}


def _usage(backbones: Sequence[Backbone]) -> str:
    best = min(backbones, key=lambda b: (("packaged", "released", "none").index(b.default.source), b.parameters))
    pretrained = "" if best.default.source == "none" else "pretrained=True, "
    return (
        "```python\nimport timm\nimport vizattn  # registers the names\n\n"
        f'model = timm.create_model("{best.name}", {pretrained}num_classes=37)\n'
        f'maps = timm.create_model("{best.name}", features_only=True)  # for dense prediction; any input size\n```'
    )


def _sizes(backbones: Sequence[Backbone]) -> str:
    rows = []
    for backbone in backbones:
        paper = next((each.published for each in backbone.weights if "params_m" in each.published), {})
        rows.append(
            {
                "name": f"`{backbone.name}`",
                "input": backbone.input,
                "parameters (M), counted here": f"{backbone.parameters / 1e6:.2f}",
                "GMACs, counted here": f"{backbone.gmacs:.{2 if backbone.gmacs >= 1 else 3}f}",
                "throughput, measured here": f"{backbone.speed:.2f}" if backbone.speed else "",
                "parameters (M), published": _figure(paper.get("params_m")),
                "GMACs, published": _figure(paper.get("gmacs")),
            }
        )
    note = (
        "Parameters (with the classifier) and multiply-adds of one image of the native size were counted by "
        "`python tools/measure_zoo.py cost`."
    )
    if any(backbone.default.published for backbone in backbones):
        note += " Published figures are the papers'."
    if any(backbone.speed for backbone in backbones):
        note += " Throughput is in units of resnet50's at the same size, see below for the command."
    return f"{markdown_table(rows, [*rows[0]][2:])}\n\n{note}"


def _figure(value: float | None) -> str:
    return "" if value is None else str(value)


def _weights(weights: Sequence[Weights]) -> str:
    rows = [
        {
            "weights": f"`{each.name}`",
            "source": _source(each),
            "licence": each.licence if each.source != "none" else "",
            "classes": str(each.cfg.num_classes or "no head"),
            "published top-1": _figure(each.published.get("top1")),
            "after ImageNet-21k": _figure(each.published.get("top1_in21k")),
            "published ADE20K mIoU": _miou(each.published.get("ade20k_miou", {})),
            "reported in": each.published.get("source", ""),
        }
        for each in weights
    ]
    released = [each for each in weights if each.source == "released"]
    notes = ["No published figures are quoted for these weights."]
    if any(each.published for each in weights):
        notes = [
            "Top-1 is the accuracy in % on ImageNet-1k's validation images as the paper reports it, mIoU (in %, one "
            "scale / several) that with the head named. None of these was measured here."
        ]
    if released:
        known = [each.name for each in released if manifest().get(each.name, {}).get("sha256")]
        notes.append(
            f"`pretrained=True` fetches released files, checks and converts them. The package knows the SHA-256 of "
            f"{len(known)} of {len(released)}; any other is trusted when first fetched, and recorded in a lock file "
            "(`vizattn weights --help`)."
        )
    if packaged := [each for each in weights if each.source == "packaged"]:
        sizes = ", ".join(f"`{each.name}` {Path(each.cfg.file).stat().st_size / 1e6:.2f} MB" for each in packaged)
        notes.append(f"In the package, rounded to half precision and cast to float32 when loaded: {sizes}.")
    if any(each.source == "none" for each in weights):
        notes.append("Where the source is none there are no weights; a paper's figures are shown for comparison.")
    return "\n\n".join([markdown_table(rows, ["classes", "published top-1", "after ImageNet-21k"]), *notes])


def _source(weights: Weights) -> str:
    if weights.source == "packaged":
        return "in the package"
    if weights.source == "none":
        return "none"
    if hub := weights.cfg.hf_hub_id:
        return f"[{hub}](https://huggingface.co/{hub})"
    url = weights.cfg.url
    return f"[{url.split('/')[2]}]({url})"


def _miou(heads: dict[str, dict[str, float]]) -> str:
    labels = {"semantic_fpn": "SemanticFPN", "upernet": "UPerNet"}
    scales = ("single_scale", "multi_scale")
    return ", ".join(
        f"{labels.get(head, head)} {' / '.join(str(figures[s]) for s in scales if s in figures)}"
        for head, figures in heads.items()
    )


def _measured(backbones: Sequence[Backbone]) -> str:
    """All rows of `results.csv` but the counts, and what has not been measured."""
    measured = [row for backbone in backbones for row in backbone.measured]
    rows = [
        {
            "name": f"`{row.name}`",
            "metric": row.metric,
            "value": f"{row.value:g}{' ' * bool(row.unit)}{row.unit}",
            "command": f"`{row.command}`",
            "commit, versions, date": f"{row.commit}; {row.versions}; {row.date}",
        }
        for row in measured
    ]
    unmeasured = [
        f"`{weights.name}`"
        for backbone in backbones
        for weights in backbone.weights
        if weights.source == "packaged" and not any("accuracy" in row.metric for row in backbone.measured)
    ]
    notes = [f"Accuracy of {', '.join(unmeasured)}: not measured yet."] if unmeasured else []
    if not any("imagenet" in row.metric.lower() for row in measured):
        notes.append("Nothing was measured here on ImageNet.")
    if not any(re.search("ade20k", row.metric, re.IGNORECASE) for row in measured):
        notes.append("Nothing was measured here on ADE20K.")
    return "\n\n".join(([markdown_table(rows, ["value"])] if rows else []) + [" ".join(notes)]).strip()


def _preprocessing(weights: Sequence[Weights]) -> str:
    groups: dict[tuple[str, ...], list[str]] = {}
    for each in weights:
        cfg = each.cfg
        how = (
            " x ".join(map(str, cfg.input_size)),
            f"{cfg.crop_pct:g}",
            cfg.interpolation,
            ", ".join(f"{value:g}" for value in cfg.mean),
            ", ".join(f"{value:g}" for value in cfg.std),
        )
        groups.setdefault(how, []).append(f"`{each.name}`")
    keys = ("input", "crop", "interpolation", "mean", "std")
    most = max(map(len, groups.values()))
    rows = [
        {**dict(zip(keys, how)), "weights": "all others" if 3 < len(names) == most else ", ".join(names)}
        for how, names in groups.items()
    ]
    return (
        f"{markdown_table(rows)}\n\nThe shorter side is resized to input / crop, then the centre is cut out. "
        "`timm.data.create_transform(**timm.data.resolve_model_data_config(model))` does this; images of other sizes "
        "work, too."
    )


@lru_cache(maxsize=1)
def _backbone_of_recipe() -> dict[str, str]:
    """Recipe -> the backbone that it trains, without a tag."""
    from vizattn.engine import load_recipe
    from vizattn.engine.recipes import list_recipes

    return {recipe: load_recipe(recipe)["model"]["name"].partition(".")[0] for recipe in list_recipes()}


def _recipes(backbones: Sequence[Backbone]) -> str:
    """The recipes in `configs` whose model is one of these."""
    names = {backbone.name for backbone in backbones}
    found: dict[str, list[str]] = {}
    for recipe, name in _backbone_of_recipe().items():
        if name in names:
            task, _, short = recipe.partition("/")
            found.setdefault(task, []).append(f"`{short}`")
    lines = [f"- {task}: {', '.join(recipes)}" for task, recipes in found.items()]
    if not lines:
        return "None of its own: any recipe takes `--cfg-options model.name=NAME`."
    return "\n".join(["By `vizattn train RECIPE`; each says what it gave.", "", *lines])


def _limits(backbones: Sequence[Backbone], text: str) -> str:
    photographs = "- Released weights were trained on photographs of ImageNet's classes: other images need fine-tuning."
    nano = [backbone.name for backbone in backbones if backbone.default.cfg.tag == "glyphs"]
    lines = [text] if text else []
    if nano and "for tests, examples and teaching" not in text:
        lines.append(f"- `{nano[0]}` is for tests, examples and teaching: its data are drawn letters and nothing else.")
    if any(backbone.default.source == "released" for backbone in backbones):
        lines.append(photographs)
    return "\n".join(lines)


def _licence(weights: Sequence[Weights]) -> str:
    lines = ["- **Code of this project, and weights in its package**: Apache-2.0."]
    groups: dict[tuple[str, str], list[str]] = {}
    for each in weights:
        if each.source == "released":
            groups.setdefault((each.licence, each.cfg.origin_url or ""), []).append(each.name)
    for (licence, origin), names in groups.items():
        by = f", by the authors ({origin})" if origin else ", by the authors"
        tags = sorted({name.partition(".")[2] for name in names})
        lines.append(f"- **Released weights** (`*.{'`, `*.'.join(tags)}`): {licence}{by}.")
        if licence == NONE_STATED:
            lines.append(
                "- **Nothing of theirs is hosted here**: neither code nor weights carry a licence. The project only "
                "knows the addresses, `pretrained=True` downloads from there, and it is for the user to see whether "
                "the terms suit. `vizattn publish` refuses to upload whole models of these names, and takes bundles, "
                "which hold an adapter and a head."
            )
    return "\n".join(lines)


def _citation(weights: Sequence[Weights], intro: str) -> str:
    """The papers of the weights, then those that the introduction names and `papers.bib` knows."""
    entries = {
        match[1]: entry
        for entry in (TEXT / "papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
        if (match := re.search(r"eprint = \{(.+?)\}", entry))
    }
    ids = list(dict.fromkeys(each.cfg.paper_ids.removeprefix("arXiv:") for each in weights if each.cfg.paper_ids))
    named = [number for number in re.findall(r"arXiv:(\d{4}\.\d{5})", intro) if number in entries and number not in ids]
    lines = [f"```bibtex\n{entries[number]}\n```" for number in [*ids, *dict.fromkeys(named)] if number in entries]
    unknown: list[Any] = [
        f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in ids if number not in entries
    ]
    return "\n\n".join([*lines, ", ".join(unknown)] if unknown else lines)

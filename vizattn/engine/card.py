"""The card of a published bundle or model: Markdown with the metadata of the Hugging Face hub at its top."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["GENERATED", "Subject", "card"]

GENERATED = "<!-- Written by `vizattn publish`. Remove this line, and it keeps your changes. -->"


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    backbone: str
    """``name`` or ``name.tag``."""
    hub_id: str | None
    """The repository of the backbone's weights, if they come from the hub."""
    adapters: list[dict[str, Any]]
    """``{"method", "options"}`` each; none for a whole model."""
    class_names: list[str] | None
    num_classes: int
    preprocessing: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    """Metric -> split -> value in 0..1."""
    recipe: Mapping[str, Any]
    """Empty if it is not known."""
    segmenter: Mapping[str, Any] | None
    """The segmentation head, None for a classifier."""
    licence: str | None
    """Of the backbone's weights."""
    pretrained: bool
    """Whether training began with the backbone's weights."""
    whole: bool
    """Whether all weights of the backbone are part of it."""
    megabytes: float

    @property
    def data(self) -> str | None:
        """The data set, by its name in the recipe; of a folder, by the folder's."""
        data = self.recipe.get("data") or {}
        return data.get("root") or data.get("name")

    @property
    def task(self) -> str:
        """In the hub's terms."""
        return "image-segmentation" if self.segmenter else "image-classification"


def card(subject: Subject, repo: str) -> str:
    """The card.

    Args:
        subject: What it is about.
        repo: ``owner/name``, which the snippet names.
    """
    parts = [
        f"---\n{_metadata(subject, repo)}\n---",
        GENERATED,
        f"# {repo.rpartition('/')[2]}\n\n{_introduction(subject)}",
        f"## Use\n\n{_usage(subject, repo)}",
        f"## Results\n\n{_results(subject)}",
        f"## Classes\n\n{_classes(subject)}",
        f"## Preprocessing\n\n{_table(subject.preprocessing)}",
        f"## Training\n\n{_training(subject)}",
        f"## Limits\n\n{'Each pixel' if subject.segmenter else 'Each image'} gets one of these classes, whatever it "
        "shows; on images unlike those of the training it may be wrong.",
        f"## Licence\n\n{_licence(subject)}",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(subject: Subject, repo: str) -> str:
    """The hub's YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    name = repo.rpartition("/")[2]
    methods = [adapter["method"] for adapter in subject.adapters]
    known: dict[str, Any] = {}
    if licence := _given_on(subject):
        known["license"] = licence
    if subject.hub_id and subject.pretrained:
        known |= {"base_model": subject.hub_id, "base_model_relation": "adapter" if methods else "finetune"}
    results = [
        EvalResult(
            task_type=subject.task,
            dataset_type=subject.data or "unknown",
            dataset_name=subject.data or "unknown",
            dataset_split=split,
            metric_type="mean_iou" if metric == "miou" else metric,
            metric_value=round(value, 6),
        )
        for metric, values in subject.metrics.items()
        for split, value in values.items()
    ]
    if results:
        known |= {"model_name": name, "eval_results": results, "metrics": sorted({r.metric_type for r in results})}
    data = ModelCardData(
        library_name="vizattn" if methods or subject.segmenter else "timm",
        pipeline_tag=subject.task,
        tags=[subject.task, "timm", "vizattn", *methods],
        **known,
    )
    return data.to_yaml().strip()


def _introduction(subject: Subject) -> str:
    head = f"a {subject.segmenter['head']} head" if subject.segmenter else "a head"
    head += f" for {subject.num_classes} classes"
    if subject.adapters:
        methods = " and ".join(f"`{adapter['method']}`" for adapter in subject.adapters)
        what = f"A bundle of vizattn ({subject.megabytes:.2f} MB): what {methods} and {head} learnt"
        if subject.whole:
            return f"{what} from `{subject.backbone}`, all of whose weights are in it."
        return (
            f"{what} on `{subject.backbone}`. The weights of the backbone itself are not in it: they are fetched from "
            "where they were published, and the bundle loads onto no others."
        )
    return f"`{subject.backbone}` with {head}, trained by vizattn: all weights ({subject.megabytes:.2f} MB)."


def _usage(subject: Subject, repo: str) -> str:
    by_hand = f"Or: `hf download {repo} --local-dir FOLDER`, then `vizattn predict IMAGES --bundle FOLDER`."
    if subject.adapters or subject.segmenter:
        module, load = "vizattn.adapters", "create_from_bundle"
        line = "model = create_from_bundle(folder)"
        if subject.class_names:
            module, load = "vizattn.engine", "load_trained"
            line = "trained = load_trained(folder)\nmodel = trained.model  # and its class_names, preprocessing"
        return (
            f"```python\nfrom huggingface_hub import snapshot_download\nfrom {module} import {load}\n\n"
            f'folder = snapshot_download("{repo}")\n{line}\n```\n\n{by_hand}'
        )
    return (
        "```python\nimport timm\nimport vizattn  # registers its backbones\n\n"
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n```\n\n"
        f"{by_hand}"
    )


def _results(subject: Subject) -> str:
    if not subject.metrics:
        return "None were recorded."
    rows = [
        f"| {_plain(metric)} | {_plain(split)} | {100 * value:.2f} % |"
        for metric, values in subject.metrics.items()
        for split, value in values.items()
    ]
    on = f"On {_plain(subject.data)}, measured" if subject.data else "Measured"
    return "\n".join(["| metric | split | value |", "| --- | --- | ---: |", *rows, "", f"{on} when training ended."])


def _classes(subject: Subject) -> str:
    if not subject.class_names:
        return f"{subject.num_classes}, without names."
    names = subject.class_names[:100]
    listed = textwrap.fill(json.dumps(names, ensure_ascii=False), 100, break_long_words=False, break_on_hyphens=False)
    more = (
        f"\n\nThe first {len(names)} of {subject.num_classes}; the files have all."
        if names != subject.class_names
        else ""
    )
    return f"````json\n{listed}\n````{more}"


def _training(subject: Subject) -> str:
    recipe = subject.recipe
    facts: dict[str, Any] = {
        "backbone": subject.backbone,
        "began with": "the weights of the backbone" if subject.pretrained else "random weights",
        **{f"adapter {a['method']}": ", ".join(f"{k}={v}" for k, v in a["options"].items()) for a in subject.adapters},
        "data": subject.data,
        "epochs": (recipe.get("schedule") or {}).get("epochs"),
        "optimizer": (recipe.get("optimizer") or {}).get("name"),
        "learning rate": (recipe.get("optimizer") or {}).get("lr"),
        "batch size": (recipe.get("data") or {}).get("batch_size"),
        "seed": recipe.get("seed"),
    }
    return _table({key: value for key, value in facts.items() if value is not None})


def _given_on(subject: Subject) -> str | None:
    """The licence of the backbone's weights, if they are part of this and have one."""
    return subject.licence if subject.pretrained and subject.licence != "none stated" else None


def _licence(subject: Subject) -> str:
    if not subject.pretrained:
        return "All weights were trained from random ones. Their owner has not chosen a licence yet (`license:` above)."
    if licence := _given_on(subject):
        return f"That of the weights of `{subject.backbone}`, which these were derived from: {licence}."
    return (
        f"The weights of `{subject.backbone}` were released without a licence. They are not part of this bundle: its "
        "users fetch them from their authors, and see whether the terms suit. No licence is given for the bundle."
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {_plain(key)} | {_plain(value)} |" for key, value in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _plain(value: object) -> str:
    """Text of any origin for a cell of a table."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

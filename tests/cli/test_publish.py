"""`vizattn publish`, and timm's own way of publishing our models."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.models import save_for_hf

import vizattn
from vizattn.cli import main
from vizattn.engine.evaluate import export, load_trained

sys.path.insert(0, str(Path(__file__).parent))

from hub import Hub, running

Capture = pytest.CaptureFixture[str]

NANO = "vit_va_nano_patch4_32"
CLASSES = ["cat", "a | pipe", "```", "<b>dog</b>"]
RECIPE: dict[str, Any] = {
    "task": "classification",
    "model": {"name": NANO, "pretrained": True},
    "adapter": None,
    "data": {"name": "folder", "root": "/home/somebody/pets", "batch_size": 8},
    "schedule": {"epochs": 3},
    "optimizer": {"name": "adamw", "lr": 0.001},
    "seed": 7,
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of this machine, and a hub that is not there."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        log_in(monkeypatch)
        yield hub


def log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a run with an adapter."""
    model = timm.create_model(NANO, pretrained=True, num_classes=len(CLASSES))
    vizattn.attach(model, "vpt", num_tokens=2)
    work_dir = tmp_path_factory.mktemp("runs") / "pets"
    vizattn.save_adapter(
        model,
        work_dir / "bundle",
        class_names=CLASSES,
        metadata={"accuracy": {"val": 0.9375, "test": 0.875}, "config": RECIPE},
    )
    return work_dir


def save_model(folder: Path, name: str = NANO, pretrained: bool = True, **options: Any) -> Path:
    """The work directory of a run of a whole model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(CLASSES), **options)
    config = {**RECIPE, "model": {"name": name, "pretrained": pretrained, **options}}
    preprocessing = {**vizattn.data.preprocessing_of(model), "crop_pct": 0.8}
    export(model, folder / "model", config, CLASSES, preprocessing, {})
    metrics = {"test": {"accuracy": 0.75, "loss": 1.0, "samples": 8}}
    (folder / "results.json").write_text(json.dumps({"metrics": metrics, "exported": f"x/{folder.name}/model"}))
    return folder


def dry_run(source: Path, target: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The metadata of the card, and its text."""
    assert main(["publish", str(source), "--dry-run", str(target), *options]) == 0
    _, front, text = (target / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_bundle_with_its_card(bundle: Path, tmp_path: Path) -> None:
    data, text = dry_run(bundle, tmp_path / "out", "--repo", "somebody/pets")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (bundle / "bundle" / "README.md").exists()
    assert data["license"] == "apache-2.0" and data["library_name"] == "vizattn"
    assert data["pipeline_tag"] == "image-classification" and {"vpt", "timm", "vizattn"} < set(data["tags"])
    (results,) = data["model-index"][0]["results"][:1]
    assert results["dataset"] == {"name": "pets", "type": "pets", "split": "val"}
    assert results["metrics"] == [{"type": "accuracy", "value": 0.9375}]
    assert f"`vpt` and a head for 4 classes learnt on `{NANO}.glyphs`" in text
    assert 'snapshot_download("somebody/pets")' in text
    assert "| accuracy | test | 87.50 % |" in text and "num_tokens=2" in text and "| epochs | 3 |" in text
    assert json.loads(re.search(r"````json\n(.*?)\n````", text, re.DOTALL)[1]) == CLASSES  # type: ignore[index]
    assert "| input_size | 3, 32, 32 |" in text


def test_published_bundle_is_the_bundle_without_paths_of_this_machine(bundle: Path, tmp_path: Path) -> None:
    dry_run(bundle / "bundle", tmp_path / "out")
    files = "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors")
    assert "somebody" not in files and '"root": "pets"' in files
    ours, theirs = (load_trained(folder).model(IMAGES) for folder in (bundle, tmp_path / "out"))
    assert torch.equal(ours, theirs)


def test_snippet_of_a_bundle_runs(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, text = dry_run(bundle, tmp_path / "out", "--repo", "somebody/pets")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo: str(tmp_path / "out"))
    namespace: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], namespace)
    assert namespace["model"](IMAGES).shape == (2, 4)


def test_model_is_read_by_timm_and_by_us(tmp_path: Path) -> None:
    run = save_model(tmp_path / "pets", depth=2)
    data, text = dry_run(run, tmp_path / "out", "--repo", "somebody/pets")
    assert data["library_name"] == "timm" and data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert 'create_model("hf-hub:somebody/pets", pretrained=True)' in text
    expected = load_trained(run)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(expected.model(IMAGES), theirs(IMAGES)) and theirs.pretrained_cfg["crop_pct"] == 0.8
    ours = load_trained(tmp_path / "out")
    assert torch.equal(expected.model(IMAGES), ours.model(IMAGES)) and ours.class_names == CLASSES
    assert "somebody/pets" in text and "/home/" not in (tmp_path / "out" / "model.json").read_text()


def test_model_trained_from_nothing_has_no_licence_yet(tmp_path: Path) -> None:
    data, text = dry_run(save_model(tmp_path / "pets", pretrained=False, depth=1), tmp_path / "out")
    assert "license" not in data and "has not chosen a licence yet" in text and "OWNER/pets" in text


def test_weights_released_without_a_licence_are_not_hosted(tmp_path: Path, capsys: Capture) -> None:
    small = {"depth": 1, "embed_dim": 48, "attn": "agent"}
    run = save_model(tmp_path / "run", "deit_agent_tiny", **small)
    assert main(["publish", str(run), "--dry-run", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "a whole model of deit_agent_tiny, whose weights were released without a licence" in message
    assert "Publish a bundle instead" in message and not list((tmp_path / "out").glob("*"))

    model = timm.create_model("deit_agent_tiny", num_classes=4, **small)
    vizattn.attach(model, "vpt", num_tokens=2)
    vizattn.save_adapter(model, tmp_path / "bundle", class_names=CLASSES)
    data, text = dry_run(tmp_path / "bundle", tmp_path / "out")
    assert "license" not in data and "were released without a licence" in text

    model = vizattn.attach(timm.create_model("deit_agent_tiny", num_classes=4, **small), "full")
    vizattn.save_adapter(model, tmp_path / "whole", class_names=CLASSES)
    assert main(["publish", str(tmp_path / "whole"), "--dry-run", str(tmp_path / "other")]) == 2
    assert "'full' makes the bundle" in capsys.readouterr().err


def test_backbone_of_the_hub_is_the_base_model(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=1)
    vizattn.attach(model, "linear_probe")
    vizattn.save_adapter(model, tmp_path / "bundle")
    data, text = dry_run(tmp_path / "bundle", tmp_path / "out")
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert data["base_model_relation"] == "adapter" and "4, without names." in text
    assert "create_from_bundle(folder)" in text and "None were recorded." in text


def test_upload(bundle: Path, hub: Hub, tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "pets"
    shutil.copytree(bundle, source)
    assert main(["publish", str(source), "--repo", "somebody/pets"]) == 0
    assert f"Published: {hub.url}/somebody/pets" in capsys.readouterr().out
    assert hub.repositories == ["somebody/pets"] and hub.tokens == {"Bearer secret"}
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files["README.md"] == (source / "bundle" / "README.md").read_bytes()
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (source / "bundle" / weights).read_bytes()

    card = source / "bundle" / "README.md"  # written by the command: made anew; changed by somebody: kept
    card.write_text(card.read_text().replace("87.50", "99.00"))
    assert main(["publish", str(source), "--repo", "somebody/pets"]) == 0
    assert b"87.50" in hub.files["README.md"]
    card.write_text("# Mine\n")
    assert main(["publish", str(source), "--repo", "somebody/pets"]) == 0
    assert hub.files["README.md"] == b"# Mine\n"


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not know the token"), (403, "the token may not write to somebody/pets"), (500, "500")],
)
def test_refused_by_the_hub(status: int, message: str, bundle: Path, hub: Hub, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(bundle, tmp_path / "pets")
    hub.status = status
    assert main(["publish", str(tmp_path / "pets"), "--repo", "somebody/pets"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not hub.files


def test_no_connection(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    shutil.copytree(bundle, tmp_path / "pets")
    log_in(monkeypatch)
    assert main(["publish", str(tmp_path / "pets"), "--repo", "somebody/pets"]) == 2
    assert "The hub at http://127.0.0.1:9 cannot be reached" in capsys.readouterr().err


def test_mistakes(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    source = tmp_path / "pets"
    shutil.copytree(bundle, source)

    def message(*arguments: object) -> str:
        assert main(["publish", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "There is no token for the hub" in message(source, "--repo", "somebody/pets")
    log_in(monkeypatch)
    assert "cannot be a repository, which is OWNER/NAME" in message(source, "--repo", "a/b/c")
    assert "Name a repository by --repo OWNER/NAME" in message(source)
    assert "There is nothing to publish in" in message(tmp_path)
    assert "choose another folder" in message(source / "bundle", "--dry-run", source / "bundle")
    (tmp_path / "file").write_text("")
    assert "choose another folder for --dry-run" in message(source, "--dry-run", tmp_path / "file" / "below")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "go on with --resume" in message(tmp_path / "run")
    weights = source / "bundle" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged: its checksum" in message(source, "--dry-run", tmp_path / "out")


@pytest.mark.parametrize("name", ["nat_nano", NANO])
def test_what_timm_pushes_to_the_hub_comes_back(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, pretrained=True, num_classes=5).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(model(IMAGES), again(IMAGES)) and again.num_classes == 5
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name and str(vizattn.__path__[0]) not in json.dumps(config)

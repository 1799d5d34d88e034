"""Weights on the Hugging Face hub, by its own client, against a hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from release import KEY, NAME, publish, published, state
from safetensors.torch import save_file
from server import Answer, Server

from vizattn.errors import VizattnError
from vizattn.weights import cached_file

HUB_ID = "somebody/nano"
ADDRESS = f"{HUB_ID}/resolve/main"


@pytest.fixture(autouse=True)
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is the server, and its cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    publish(monkeypatch, hf_hub_id=HUB_ID)
    server.etag = f'"{"a" * 40}"'
    server.always = Answer(headers={"X-Repo-Commit": "b" * 40})


def test_fetched_once_and_loaded(server: Server, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w")
    server.files[f"{ADDRESS}/model.safetensors"] = (tmp_path / "w").read_bytes()
    for _ in range(2):
        model = timm.create_model(NAME, pretrained=True)
        assert torch.equal(model.head.weight, state()["head.weight"])
    paths = [path for path, _ in server.requests if not path.startswith("/api/")]
    assert paths == [f"/{ADDRESS}/model.safetensors"] * 2, "a HEAD and a GET"


def test_the_older_file_where_there_is_no_safetensors(server: Server) -> None:
    server.files[f"{ADDRESS}/pytorch_model.bin"] = published()
    server.script = [Answer(404, headers={"X-Repo-Commit": "b" * 40, "X-Error-Code": "EntryNotFound"})]
    model = timm.create_model(NAME, pretrained=True)
    assert torch.equal(model.head.weight, state()["head.weight"])
    assert (tmp := cached_file(KEY)).exists() and tmp.parent.name == "weights"


@pytest.mark.parametrize(
    "code, status, match",
    [
        ("EntryNotFound", 404, "somebody/nano has none of model.safetensors, pytorch_model.bin"),
        ("RepoNotFound", 404, "no such repository"),
        ("GatedRepo", 403, "asks for consent"),
        ("", 500, "500"),
    ],
)
def test_refusals(code: str, status: int, match: str, server: Server) -> None:
    server.always = Answer(status, headers={"X-Repo-Commit": "b" * 40, "X-Error-Code": code})
    with pytest.raises(VizattnError, match=f"cannot be fetched.*{match}.*by hand from https://huggingface.co/{HUB_ID}"):
        timm.create_model(NAME, pretrained=True)


def test_no_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(VizattnError, match=r"cannot be fetched.*the hub cannot be reached"):
        timm.create_model(NAME, pretrained=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VizattnError, match=r"cannot be fetched.*HF_HUB_OFFLINE is set"):
        timm.create_model(NAME, pretrained=True)


def test_the_older_file_of_the_hubs_cache_is_enough_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, commit = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}", "b" * 40
    for path, content in (("refs/main", commit.encode()), (f"snapshots/{commit}/pytorch_model.bin", published())):
        (repository / path).parent.mkdir(parents=True)
        (repository / path).write_bytes(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = timm.create_model(NAME, pretrained=True)
    assert torch.equal(model.head.weight, state()["head.weight"])


def test_a_mirror_goes_before_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZATTN_MIRROR", f"{server.url}/mirror")
    server.files[f"mirror/{KEY}.safetensors"] = published()
    timm.create_model(NAME, pretrained=True)
    assert [path for path, _ in server.requests] == [f"/mirror/{KEY}.safetensors"]

"""`pretrained=True` from end to end: fetched once, checked, converted, kept, and said aloud when adapted."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from release import KEY, NAME, publish, published, state
from safetensors import SafetensorError
from server import Answer, Server

from vizattn.errors import VizattnError
from vizattn.weights import cache_folder, cached_file, fetch, find, lock_file, release_of, save_converted, trust, verify
from vizattn.weights.place import held

FILE = f"{KEY}.pth"


@pytest.fixture(autouse=True)
def release(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nano's weights are at the server, and nowhere else."""
    server.files[FILE] = published()
    publish(monkeypatch, url=f"{server.url}/{FILE}")


def get(**kwargs: Any) -> Path:
    release = release_of(find(NAME))
    assert release
    return fetch(release, **kwargs)


def refuse(match: str, **kwargs: Any) -> str:
    with pytest.raises(VizattnError, match=match) as caught:
        get(**kwargs)
    assert not cached_file(KEY).exists()
    return str(caught.value)


def files() -> list[str]:
    """What the cache holds, locks aside."""
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.suffix != ".lock")


def test_fetched_once_and_loaded(server: Server) -> None:
    for _ in range(2):
        model = timm.create_model(NAME, pretrained=True)
        for key, value in model.state_dict().items():
            assert torch.equal(value, state()[key]), key
        assert model.pretrained_cfg["url"].startswith(server.url)
        assert "file" not in model.pretrained_cfg, "a place on this machine would be published with the model"
    assert len(server.requests) == 1
    assert files() == [f"{KEY}.safetensors", "weights.lock.json"]


def test_no_server_is_needed_again(server: Server) -> None:
    path = get()
    server.shutdown()
    server.server_close()
    assert get() == path


def test_timms_own_way_to_name_a_cache(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
        assert torch.equal(model.head.weight, state()["head.weight"])
    assert len(server.requests) == 1 and not cache_folder().exists()
    assert (tmp_path / "mine" / f"{KEY}.safetensors").is_file()


def test_adaptations_are_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vizattn")
    timm.create_model(NAME, pretrained=True)
    assert "adapted" not in caplog.text
    timm.create_model(NAME, pretrained=True, num_classes=10, in_chans=1, img_size=64)
    assert caplog.messages[-1] == (
        f"The weights of {NAME} are adapted: head is newly initialised for 10 classes, the weights are for 52; "
        "patch_embed.proj is made for 1 channels from 3; resized: pos_embed from (1, 65, 96) to (1, 257, 96)."
    )
    timm.create_model(NAME, pretrained=True, num_classes=0)
    assert caplog.messages[-1].endswith("adapted: head is dropped, no classes were asked for.")
    count = len(caplog.messages)
    timm.create_model(NAME, pretrained=True, features_only=True)
    assert len(caplog.messages) == count


def test_resized_exactly_as_from_the_release(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(published())
    direct = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / FILE)}, img_size=48
    )
    cached = timm.create_model(NAME, pretrained=True, img_size=48)
    assert all(torch.equal(a, b) for a, b in zip(direct.state_dict().values(), cached.state_dict().values()))


def test_another_address_is_another_entry(server: Server) -> None:
    get()
    server.files["mine.pth"] = published(1)
    overlay = {"url": f"{server.url}/mine.pth"}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.weight, state(1)["head.weight"])
    assert torch.equal(timm.create_model(NAME, pretrained=True).head.weight, state()["head.weight"])


def test_a_model_that_differs_does_not_change_what_is_kept(server: Server) -> None:
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"input_size": (3, 48, 48)})
    plain = timm.create_model(NAME, pretrained=True)
    assert torch.equal(plain.pos_embed, state()["pos_embed"])
    release = release_of(dataclasses.replace(find(NAME), num_classes=10))
    assert release and release.key == KEY and release.cfg.num_classes == 52
    cached_file(KEY).unlink()
    fetch(release)
    assert torch.equal(timm.create_model(NAME, pretrained=True).head.weight, state()["head.weight"])


def test_another_address_is_kept_for_each_model_it_is_converted_for(server: Server) -> None:
    other = dataclasses.replace(find(NAME), url=f"{server.url}/mine.pth")
    releases = [release_of(dataclasses.replace(other, **kw)) for kw in ({}, {"input_size": (3, 48, 48)})]
    releases.append(release_of(dataclasses.replace(other, num_classes=10)))
    assert len({release.key for release in releases if release}) == 3


@pytest.mark.parametrize("tag", ["/../../elsewhere", "a/b", "a\\b", "a\n"])
def test_a_tag_is_no_path(tag: str, server: Server) -> None:
    overlay = {"url": f"{server.url}/{FILE}", "tag": tag}
    with pytest.raises(VizattnError, match="cannot name weights"):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert server.requests == [] and not cache_folder().exists()


def test_the_first_file_is_trusted_and_no_other(server: Server) -> None:
    get()
    entry = json.loads(lock_file().read_text())[KEY]
    assert entry == {
        "sha256": hashlib.sha256(published()).hexdigest(),
        "size": len(published()),
        "source": f"{server.url}/{FILE}",
    }
    server.files[FILE] = published(1)
    with pytest.raises(VizattnError, match=r"not the right one.*the lock file .*take its entry out"):
        get(again=True)
    assert torch.equal(timm.create_model(NAME, pretrained=True).head.weight, state()["head.weight"])


def test_a_lock_file_of_a_project(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get()
    lock = tmp_path / "project" / "weights.json"
    monkeypatch.setenv("VIZATTN_LOCK", str(lock))
    get()
    entry = json.loads(lock.read_text())
    assert list(entry) == [KEY], "what is in the cache already is recorded, too"
    entry[KEY]["sha256"] = "0" * 64
    lock.write_text(json.dumps(entry))
    assert verify(release_of(find(NAME))).startswith(f"made from another file than the lock file {lock}")  # type: ignore[arg-type]
    with pytest.raises(VizattnError, match=r"not the right one.*weights\.json"):
        get()
    lock.write_text('{"x": 3}')
    with pytest.raises(VizattnError, match=r"lock file of weights .*weights\.json is damaged"):
        get()


def test_caches_that_share_a_lock_file_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VIZATTN_LOCK", str(tmp_path / "project" / "weights.json"))
    with held(tmp_path / "project" / "weights.json.lock", "writing"):
        other = threading.Thread(target=get)
        other.start()
        while "waiting" not in caplog.text and other.is_alive():
            time.sleep(0.01)
        assert not lock_file().exists()
    other.join()
    assert f"Another process is writing {lock_file()}; waiting for it." in caplog.text
    assert list(json.loads(lock_file().read_text())) == [KEY]


def test_the_manifest_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"file": "w.pth", "size": len(published()), "sha256": hashlib.sha256(published()).hexdigest()}
    monkeypatch.setattr(trust, "manifest", lambda: {KEY: entry})
    get()
    assert files() == [f"{KEY}.safetensors"], "nothing needs to be recorded"
    cached_file(KEY).unlink()
    entry["sha256"] = "0" * 64
    refuse("not the right one.*vizattn's manifest says")


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_does_not_run(legacy: bool, server: Server, tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", io.BytesIO()
    checkpoint = {"model": state(), "args": Malicious(mark)}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not legacy)
    server.files[FILE] = file.getvalue()
    refuse(r"is refused: it holds an object of (posix|nt)\.mkdir")
    assert not mark.exists() and files() == []
    server.files[FILE] = pickle.dumps(checkpoint, protocol=2)
    refuse("refused|cannot be read as weights")
    assert not mark.exists() and files() == []


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_file_cut_short_at_its_source(keep: float, server: Server) -> None:
    server.files[FILE] = published()[: int(keep * len(published()))]
    refuse("cannot be read as weights, it is damaged or cut short")
    assert files() == []


@pytest.mark.parametrize("content, match", [({"model": {"x": torch.ones(1)}}, "do not fit"), ([1], "holds a list")])
def test_a_file_of_something_else(content: Any, match: str, server: Server) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    server.files[FILE] = file.getvalue()
    refuse(f"What came from .* cannot be used.*{match}")
    assert files() == []


def test_what_to_do_is_said(server: Server) -> None:
    server.always = Answer(403)
    message = refuse("cannot be fetched")
    assert f"{server.url}/{FILE}: the server answers 403" in message
    assert message.endswith(
        f"by hand from {server.url}/{FILE} and give it with: vizattn weights fetch {KEY} --from FILE"
    )
    with pytest.raises(VizattnError, match="cannot be fetched"):
        timm.create_model(NAME, pretrained=True)


def test_by_hand(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(published())
    get(given=tmp_path / "w")
    assert (tmp_path / "w").exists() and server.requests == []
    assert torch.equal(timm.create_model(NAME, pretrained=True).head.weight, state()["head.weight"])
    with pytest.raises(VizattnError, match="There is no file"):
        get(given=tmp_path / "gone")
    (tmp_path / "w").write_bytes(published(1))
    with pytest.raises(VizattnError, match="is not the right one"):
        get(given=tmp_path / "w")


def test_a_mirror_goes_first(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIZATTN_MIRROR", f"{server.url}/mirror/")
    get()
    assert [path for path, _ in server.requests] == [f"/mirror/{FILE}", f"/{FILE}"], "it has no such file"
    server.files[f"mirror/{FILE}"] = published()
    get(again=True)
    assert [path for path, _ in server.requests[2:]] == [f"/mirror/{FILE}"]


def test_a_damaged_cache_is_mended(server: Server) -> None:
    path = get()
    path.write_bytes(path.read_bytes()[:-10])
    get()
    release = release_of(find(NAME))
    assert release and verify(release) == "ok" and len(server.requests) == 2
    damaged = bytearray(path.read_bytes())
    damaged[-10] ^= 1
    path.write_bytes(damaged)
    assert verify(release).startswith("damaged")
    get(again=True)
    assert verify(release) == "ok"


def test_two_at_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.script = [Answer(cut=1000, stall=0.3)]
    threads = [threading.Thread(target=get) for _ in range(2)]
    threads[0].start()
    while not server.requests:
        time.sleep(0.01)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert server.ranges() == [None, "bytes=1000-"], "the second used the first's file"
    assert f"Another process is fetching {KEY}; waiting for it." in caplog.text


def test_a_process_that_dies_does_not_block(caplog: pytest.LogCaptureFixture) -> None:
    lock = cache_folder() / "locks" / f"{KEY}.lock"
    lock.parent.mkdir(parents=True)
    code = (
        "import filelock, sys, time; x = filelock.FileLock(sys.argv[1]); x.acquire(); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        threading.Timer(0.2, other.kill).start()
        get()
    assert "Another process is fetching" in caplog.text


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIZATTN_HOME", str(tmp_path / "file"))
    with pytest.raises(VizattnError, match=r"Cannot write .*file.*: Not a directory.*VIZATTN_HOME"):
        timm.create_model(NAME, pretrained=True)


def test_a_read_only_cache_is_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    get()
    lock_file().unlink()

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise OSError(30, "Read-only file system", "cache")

    monkeypatch.setattr(trust, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    get()
    assert len(server.requests) == 1


def test_a_disk_that_fills_while_converting(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_state: Any, path: Path, **_kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    refuse(r"Cannot write .*safetensors: No space left on device\. Free some space or choose another folder by .*HOME")
    assert files() == [FILE], "what was fetched is kept"
    monkeypatch.undo()


def test_what_was_fetched_before_a_crash_is_used(server: Server) -> None:
    kept = cache_folder() / "downloads" / FILE
    kept.parent.mkdir(parents=True)
    kept.write_bytes(published())
    get()
    assert server.requests == [] and not kept.exists()


def test_again_asks_the_server(server: Server) -> None:
    kept = cache_folder() / "downloads" / FILE
    kept.parent.mkdir(parents=True)
    kept.write_bytes(published(1))
    get(again=True)
    assert len(server.requests) == 1 and not kept.exists()
    assert torch.equal(timm.create_model(NAME, pretrained=True).head.weight, state()["head.weight"])


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_of_the_users_stays(whole: bool) -> None:
    mine = cache_folder() / "downloads" / FILE
    mine.parent.mkdir(parents=True)
    mine.write_bytes(content := published() if whole else b"nothing")
    with suppress(VizattnError):
        get(given=mine)
    assert mine.read_bytes() == content


def test_a_cached_file_that_does_not_load_is_named() -> None:
    path = get()
    save_converted({"head.bias": torch.zeros(1)}, path, source_sha256=hashlib.sha256(published()).hexdigest())
    with pytest.raises(VizattnError) as caught:
        timm.create_model(NAME, pretrained=True)
    message = str(caught.value)
    assert f"could not be loaded from {path}. " in message
    assert message.endswith(f"If the file is damaged, fetch it anew with: vizattn weights fetch {KEY} --again")


def test_a_size_without_weights_names_those_that_have_some() -> None:
    with pytest.raises(VizattnError, match=r"no weights of 'dinat_s_large'.*pretrained=False; .*dinat_s_tiny.*\.$"):
        timm.create_model("dinat_s_large", pretrained=True)
    with pytest.raises(VizattnError, match=r"no weights of 'halonet_va_h0' to load, use it with pretrained=False"):
        timm.create_model("halonet_va_h0", pretrained=True)

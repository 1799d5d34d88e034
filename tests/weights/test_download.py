"""Downloads against a server that misbehaves: each failure is one clear message, and nothing wrong is kept."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from server import Answer, Server
from urllib3 import HTTPSConnectionPool
from urllib3.exceptions import MaxRetryError, SSLError

from vizattn.errors import VizattnError
from vizattn.weights import download as module
from vizattn.weights.download import Patience, _Download, download
from vizattn.weights.trust import Trusted

QUICK = Patience(attempts=3, pause=0.0, timeout=0.3)


def checkpoint(seed: int = 0, numbers: int = 1000) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": torch.randn(numbers, generator=torch.Generator().manual_seed(seed))}, file)
    return file.getvalue()


DATA = checkpoint()
SHA256 = hashlib.sha256(DATA).hexdigest()
KNOWN = Trusted(len(DATA), SHA256, "the test")


@pytest.fixture
def target(tmp_path: Path, server: Server) -> Path:
    server.files["w.pth"] = DATA
    return tmp_path / "w.pth"


def get(server: Server, target: Path, trusted: Trusted = KNOWN, patience: Patience = QUICK) -> bytes:
    url, sha256 = download([f"{server.url}/w.pth"], target, trusted, "w", patience)
    assert url == f"{server.url}/w.pth"
    assert sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert [path.name for path in target.parent.iterdir() if path.name.startswith("w.")] == ["w.pth"]
    return target.read_bytes()


def refuse(server: Server, target: Path, match: str, trusted: Trusted = KNOWN, patience: Patience = QUICK) -> str:
    with pytest.raises(VizattnError, match=match) as caught:
        download([f"{server.url}/w.pth"], target, trusted, "w", patience)
    assert not target.exists()
    return str(caught.value)


def part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


@pytest.mark.parametrize("trusted", [KNOWN, Trusted()])
def test_a_file_arrives(trusted: Trusted, server: Server, target: Path) -> None:
    assert get(server, target, trusted) == DATA


@pytest.mark.parametrize("trusted", [KNOWN, Trusted()])
def test_a_short_read_is_resumed(trusted: Trusted, server: Server, target: Path) -> None:
    server.script = [Answer(cut=1000), Answer(cut=500)]
    assert get(server, target, trusted) == DATA
    assert server.ranges() == [None, "bytes=1000-", "bytes=1500-"]
    assert [headers.get("If-Range") for _, headers in server.requests] == [None, '"v1"', '"v1"']


def test_the_next_call_resumes(server: Server, target: Path) -> None:
    server.script = [Answer(cut=100), Answer(cut=0), Answer(cut=0)]
    refuse(server, target, r"connection.*3 times in a row", Trusted())
    assert part(target).read_bytes() == DATA[:100]
    assert get(server, target, Trusted()) == DATA
    assert server.ranges()[-1] == "bytes=100-"


@pytest.mark.parametrize("note", ["[]", "null", "3", '{"url": 3}', "[" * 100_000, '{"url": URL, "validator": 7}'])
def test_a_damaged_note_of_a_part_is_as_none(note: str, server: Server, target: Path) -> None:
    part(target).write_bytes(b"half")
    text = note.replace("URL", f'"{server.url}/w.pth"')
    target.with_name(f"{target.name}.part.json").write_text(text)
    assert get(server, target, Trusted()) == DATA


def test_last_modified_validates_where_there_is_no_strong_etag(server: Server, target: Path) -> None:
    server.etag, server.modified = 'W/"weak"', formatdate(0, usegmt=True)
    server.script = [Answer(cut=100)]
    assert get(server, target, Trusted()) == DATA
    assert server.requests[1][1]["If-Range"] == server.modified


def test_without_validator_and_hash_it_starts_again(server: Server, target: Path) -> None:
    server.etag = None
    server.script = [Answer(cut=100)]
    assert get(server, target, Trusted()) == DATA
    assert server.ranges() == [None, None]


def test_with_a_known_hash_no_validator_is_needed(server: Server, target: Path) -> None:
    server.etag = None
    server.script = [Answer(cut=100)]
    assert get(server, target) == DATA
    assert server.ranges() == [None, "bytes=100-"]


def test_a_file_that_changes_between_parts_is_taken_whole(server: Server, target: Path) -> None:
    newer = checkpoint(1)
    assert newer[:2000] != DATA[:2000]
    server.script = [Answer(cut=2000), Answer(cut=0), Answer(cut=0)]
    refuse(server, target, "in a row", Trusted())
    server.files["w.pth"], server.etag = newer, '"v2"'
    assert get(server, target, Trusted()) == newer


@pytest.mark.parametrize("ignore_range", [True, False])
def test_a_wrong_beginning_is_noticed(ignore_range: bool, server: Server, target: Path) -> None:
    """Without a validator nothing but the hash tells that the kept part was of another version."""
    server.etag = None
    part(target).write_bytes(b"x" * 100)
    server.script = [Answer(ignore_range=ignore_range)]
    assert get(server, target) == DATA


@pytest.mark.parametrize("length", [len(DATA), len(DATA) + 5])
def test_a_whole_or_overlong_part(length: int, server: Server, target: Path) -> None:
    part(target).write_bytes((DATA + b"extra")[:length])
    assert get(server, target) == DATA
    assert len(server.requests) == (1 if length == len(DATA) else 2)


def test_parts_that_never_fit_end(server: Server, target: Path) -> None:
    """The file is not the right one, and each connection ends after a megabyte: nothing may go on for ever."""
    server.files["w.pth"] = checkpoint(numbers=400_000)
    server.always = Answer(cut=1_100_000)
    refuse(server, target, "in a row", Trusted(None, "0" * 64, "the test"))
    assert server.ranges() == [None, "bytes=1100000-", None]


@pytest.mark.parametrize("trusted", [KNOWN, Trusted()])
def test_a_server_that_gives_less_at_a_time_is_asked_for_the_rest(
    trusted: Trusted, server: Server, target: Path
) -> None:
    server.script = [Answer(cut=1000)]
    for start, end in ((1000, 1300), (1300, 1600)):
        told = {"Content-Range": f"bytes {start}-{end - 1}/{len(DATA)}"}
        server.script.append(Answer(206, body=DATA[start:end], headers=told))
    assert get(server, target, trusted) == DATA
    assert server.ranges() == [None, "bytes=1000-", "bytes=1300-", "bytes=1600-"]


def test_another_range_than_asked_for(server: Server, target: Path) -> None:
    part(target).write_bytes(DATA[:100])
    server.script = [Answer(status=206, body=DATA[50:], headers={"Content-Range": f"bytes 50-{len(DATA)}/*"})]
    assert get(server, target) == DATA


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(status: int, server: Server, target: Path, caplog: Any) -> None:
    server.script = [Answer(status=status)] * 2
    assert get(server, target) == DATA
    assert f"the server answers {status}" in caplog.text
    server.always = Answer(status=status)
    target.unlink()
    refuse(server, target, rf"answers {status} .*3 times in a row")


def test_pauses_double_and_retry_after_is_heeded(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    quick = SimpleNamespace(sleep=pauses.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(module, "time", quick)
    date = formatdate(time.time() + 40, usegmt=True)
    server.script = [Answer(503), Answer(503), Answer(503), Answer(429, headers={"Retry-After": "7"})]
    server.script += [Answer(429, headers={"Retry-After": date}), Answer(429, headers={"Retry-After": "soon"})]
    assert get(server, target, patience=Patience(attempts=9, pause=0.5)) == DATA
    assert pauses[:4] == [0.5, 1.0, 2.0, 7.0]
    assert pauses[4] == pytest.approx(40, abs=3) and pauses[5] == 16.0
    server.always = Answer(429, headers={"Retry-After": "3600"})
    target.unlink()
    refuse(server, target, r"answers 429 .*asks to come back in 3600 s")


@pytest.mark.parametrize(
    "status, match", [(404, "there is no such file"), (403, "no permission"), (401, "wants a login"), (410, "410 Gone")]
)
def test_what_cannot_change_is_not_tried_again(status: int, match: str, server: Server, target: Path) -> None:
    server.always = Answer(status=status)
    refuse(server, target, match)
    assert len(server.requests) == 1


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", ""])
def test_a_login_page_is_not_a_file(content_type: str, server: Server, target: Path) -> None:
    server.always = Answer(body=b"<!doctype html><html>Sign in", headers={"Content-Type": content_type})
    refuse(server, target, "a web page", Trusted())
    assert len(server.requests) == 1 and not part(target).exists()


def test_something_else_is_not_a_file_of_weights(server: Server, target: Path) -> None:
    server.always = Answer(body=b'{"error": "no such share"}')
    refuse(server, target, "what the server sent is not a file of weights", Trusted())
    server.always = Answer(body=b"")
    refuse(server, target, "an empty file", Trusted())


def test_a_compressed_answer_is_refused(server: Server, target: Path) -> None:
    server.always = Answer(headers={"Content-Encoding": "gzip"})
    refuse(server, target, "compressed by gzip")
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def test_a_wrong_hash_is_refused(server: Server, target: Path) -> None:
    wrong = Trusted(len(DATA), "0" * 64, "the manifest")
    message = refuse(server, target, "not the right one", wrong)
    assert SHA256 in message and "the manifest says" in message and "0" * 64 in message
    assert not part(target).exists() and len(server.requests) == 1


def test_a_wrong_size_is_refused_before_it_is_fetched(server: Server, target: Path) -> None:
    refuse(server, target, f"has {len(DATA)} bytes instead of 7, says the test", Trusted(7, None, "the test"))
    server.always = Answer(headers={"Content-Length": ""})  # nor is it known before the end
    refuse(server, target, "not the right one: ", Trusted(7, None, "the test"))
    assert not part(target).exists()


def test_a_dead_host(target: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/w.pth"
        with pytest.raises(VizattnError, match=r"w\.pth: the connection failed \(.*refused.*\), 3 times in a row\."):
            download([url], target, KNOWN, "w", QUICK)


def test_a_silent_server(server: Server, target: Path) -> None:
    server.script = [Answer(cut=100, stall=1.0)]
    assert get(server, target) == DATA
    assert server.ranges() == [None, "bytes=100-"]


def test_a_trickle_counts_as_silence(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.RequestHandlerClass, "_answer", trickle)
    refuse(server, target, "less than 100 bytes a second", patience=Patience(1, 0.0, timeout=0.2))
    assert 0 < part(target).stat().st_size < 100


def trickle(self: Any, body: bool) -> None:
    self.send_response(200)
    self.send_header("Content-Length", str(len(DATA)))
    self.end_headers()
    for byte in DATA[:100]:
        try:
            self.wfile.write(bytes([byte]))
        except OSError:
            return
        time.sleep(0.05)


def test_a_loop_of_redirects(server: Server, target: Path) -> None:
    server.always = Answer(302, headers={"Location": "/w.pth"})
    refuse(server, target, "redirects in a loop")
    assert len(server.requests) <= 12


def test_a_redirect_is_followed_but_not_out_of_encryption(server: Server, target: Path) -> None:
    server.files["other.pth"] = DATA
    server.script = [Answer(302, headers={"Location": "/other.pth"})]
    assert get(server, target) == DATA
    safe, unsafe = SimpleNamespace(url="https://example.org/w.pth"), SimpleNamespace(url="http://example.org/w.pth")
    for history, url in (([safe], unsafe.url), ([safe, unsafe], safe.url)):
        response = SimpleNamespace(status_code=200, headers={}, url=url, history=history)
        with pytest.raises(module._Never, match="without encryption, http://example"):
            _Download(safe.url, target, KNOWN, QUICK, lambda *_: None)._accept(response, 0)


def test_a_certificate_that_is_refused_is_final_and_no_other_failure_of_encryption(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VizattnError, match=r"the connection failed \(.*SSL.*\), 3 times in a row"):
        download([f"{server.url.replace('http', 'https')}/w.pth"], target, KNOWN, "w", QUICK)
    asked = []

    def get(*args: Any, **_kwargs: Any) -> Any:
        asked.append(args)
        cause = SSLError(ssl.SSLCertVerificationError(1, "self-signed certificate"))
        raise requests.exceptions.SSLError(MaxRetryError(HTTPSConnectionPool("h"), "/w.pth", cause))

    monkeypatch.setattr(requests.Session, "get", get)
    refuse(server, target, "its certificate is not accepted")
    assert len(asked) == 1


@pytest.mark.parametrize("url", ["htp://127.0.0.1/w.pth", "nothing", "http://"])
def test_no_address(url: str, target: Path) -> None:
    with pytest.raises(VizattnError, match="this is no address to download from"):
        download([url], target, KNOWN, "w", QUICK)


def test_a_full_disk(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "open", lambda path, mode: Full(path, mode), raising=False)
    with pytest.raises(OSError, match="No space left"):
        get(server, target)
    assert not target.exists() and part(target).stat().st_size == 50
    monkeypatch.undo()
    assert get(server, target) == DATA
    assert server.ranges()[-1] == "bytes=50-"


def test_too_little_space_is_seen_first(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=len(DATA) - 1))
    with pytest.raises(OSError, match="No space left on device") as caught:
        get(server, target)
    assert caught.value.errno == errno.ENOSPC and not part(target).exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Control-C raises, also in a process that was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_control_c_keeps_what_has_arrived(server: Server, target: Path, caplog: Any) -> None:
    server.script = [Answer(cut=100, stall=2.0)]
    caplog.set_level(logging.INFO)
    here = threading.get_ident()

    def interrupt() -> None:
        while not server.ranges():  # until it has been asked
            time.sleep(0.01)
        time.sleep(0.3)
        signal.pthread_kill(here, signal.SIGINT)  # wakes this very thread from waiting for the rest

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        get(server, target, Trusted(), Patience(pause=0.0))
    assert not target.exists() and "Stopped fetching" in caplog.text and "the next call goes on there" in caplog.text
    assert get(server, target, Trusted()) == DATA
    assert server.ranges()[-1] == "bytes=100-"


def test_the_next_address_is_tried(server: Server, target: Path, caplog: Any) -> None:
    urls = [f"{server.url}/mirror/w.pth", f"{server.url}/w.pth"]
    assert download(urls, target, KNOWN, "w", QUICK) == (urls[1], SHA256)
    assert "404" in caplog.text and f"Trying {urls[1]} instead" in caplog.text
    del server.files["w.pth"]
    target.unlink()
    with pytest.raises(VizattnError, match=r"mirror/w\.pth: .*404.*/w\.pth: .*404"):
        download(urls, target, KNOWN, "w", QUICK)


def test_a_login_in_an_address_is_used_and_not_told(server: Server, target: Path, caplog: Any) -> None:
    url = server.url.replace("://", "://me:secret@")
    server.script = [Answer(cut=10), Answer(503)]
    source, _ = download([f"{url}/gone.pth", f"{url}/w.pth"], target, KNOWN, "w", QUICK)
    assert source == f"{server.url}/w.pth" and server.requests[0][1]["Authorization"].startswith("Basic ")
    with pytest.raises(VizattnError, match="404") as caught:
        download([f"{url}/gone.pth"], target, KNOWN, "w", QUICK)
    assert "Trying" in caplog.text and "secret" not in caplog.text + str(caught.value)


def test_a_proxy_of_the_environment_is_used(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address names a host that does not exist; the proxy, our server, has the file."""
    server.files["http://weights.invalid/w.pth"] = DATA
    monkeypatch.setenv("http_proxy", server.url)
    download(["http://weights.invalid/w.pth"], target, KNOWN, "w", QUICK)
    assert server.requests[0][0] == "http://weights.invalid/w.pth" and target.read_bytes() == DATA

"""`vizattn serve`: a real process, what it says, what many clients that mean harm do to it, and how it ends."""

from __future__ import annotations

import io
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import timm
import torch
from PIL import Image

import vizattn
from vizattn.cli import main
from vizattn.data import preprocessing_of

Capture = pytest.CaptureFixture[str]
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=3)
    vizattn.attach(model, "vpt", num_tokens=2)
    folder = tmp_path_factory.mktemp("letters") / "bundle"
    vizattn.save_adapter(model, folder, class_names=list("abc"), preprocessing=preprocessing_of(model))
    return folder


def test_mistakes(bundle: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["serve", "--bundle", str(tmp_path), "--port", "0"]) == 2
    assert "There is no trained model in" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--bundle", str(bundle), "--port", port]) == 2
    assert f"Cannot listen at 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    for host, number in (("no.such.host.invalid", "0"), ("127.0.0.1", "99999")):
        assert main(["serve", "--bundle", str(bundle), "--host", host, "--port", number]) == 2
        assert f"Cannot listen at {host}, port {number}: " in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--bundle", str(bundle)]) == 2
    assert 'Serving needs fastapi and uvicorn and python-multipart: pip install "vizattn[serve]"' in (
        capsys.readouterr().err
    )


@pytest.fixture
def server(bundle: Path) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """The process, and where it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vizattn", "serve", "--bundle", str(bundle), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], 240)
    line = process.stdout.readline() if ready else ""
    match = re.fullmatch(r"Serving at (http://127\.0\.0\.1:\d+)  \(Ctrl-C ends it\)\n", line)
    if not match:
        process.kill()
    assert match, process.communicate()[1]
    place = urlsplit(match[1])
    yield process, str(place.hostname), int(place.port or 0)
    if process.poll() is None:
        process.kill()
    process.wait()


def exchange(place: tuple[str, int], sent: bytes, patience: float = 60) -> bytes:
    """All that comes back until the other side or the time ends it."""
    with socket.create_connection(place, timeout=patience) as connection:
        answer = b""
        try:
            connection.sendall(sent)
            while part := connection.recv(1 << 16):
                answer += part
        except (ConnectionError, TimeoutError):  # ended before all was sent, or read
            pass
        return answer


def request(body: bytes, path: str = "/predict", head: str = "", length: int | None = None) -> bytes:
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="../../x"\r\n\r\n' + body + b"\r\n--x--\r\n"
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *([head] if head else [])]
    lines += ["Content-Type: multipart/form-data; boundary=x", f"Content-Length: {length or len(form)}"]
    return "\r\n".join([*lines, "", ""]).encode() + form


def hostile(letter: bytes, chance: random.Random) -> list[bytes]:
    """Requests of every bad kind."""
    flipped = bytearray(letter)
    for _ in range(20):
        flipped[chance.randrange(len(flipped))] = chance.randrange(256)
    bomb = zlib.compress(bytes(30_000_000))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)), (b"IDAT", bomb), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    webp = b"RIFF\x1e\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02\x00\x00\x00" + b"\xfe\x3f\x00" * 2 + bytes(8)
    chunked = "POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
    chunked += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    return [
        request(bytes(flipped)),
        request(letter[: chance.randrange(len(letter))]),
        request(b""),
        request(chance.randbytes(5000)),
        request(b"\x89PNG\r\n\x1a\n" + png),
        request(webp, "/attention"),
        request(letter, "/predict?top_k=999999999999999999999"),
        request(letter, "/../../etc/passwd"),
        request(letter, head="Origin: http://evil.example"),
        request(letter, length=10**12),
        request(letter, length=20) + letter,  # what follows is no request
        chunked.encode() + b"100000\r\n" + bytes(1 << 20) + b"\r\nzz\r\n",
        chunked.encode() + (b"100000\r\n" + bytes(1 << 20) + b"\r\n") * 25,  # without an end
        b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        chance.randbytes(1000) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + chance.randbytes(100),  # TLS
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n",
    ]


def said_why(body: bytes) -> bool:
    """Whether an answer is an error in JSON, or uvicorn's own of what is no HTTP."""
    if body == b"Invalid HTTP request received.":
        return True
    try:
        return bool(json.JSONDecoder().raw_decode(body.decode())[0]["error"])  # the answer to what follows comes behind
    except (ValueError, KeyError):
        return False


def peak_megabytes(pid: int) -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a process that starts takes minutes where others have the cores
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_bounded_load_with_hostile_inputs(server: tuple[subprocess.Popen[str], str, int]) -> None:
    process, *place = server
    at = (place[0], place[1])
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "PNG")
    letter = buffer.getvalue()
    assert b" 200 " in exchange(at, request(letter)).split(b"\r\n")[0]
    before = peak_megabytes(process.pid)
    idle = [socket.create_connection(at) for _ in range(20)]  # say nothing, or half a head
    for connection in idle[::2]:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: ")
    statuses: Counter[str] = Counter()
    odd: list[bytes] = []

    def client(seed: int) -> None:
        chance = random.Random(seed)
        requests = [*hostile(letter, chance), *[request(letter), request(letter, "/attention")] * 4]
        chance.shuffle(requests)
        for sent in requests:
            answer = exchange(at, sent)
            head, _, body = answer.partition(b"\r\n\r\n")
            status = head.split(b" ")[1].decode() if head.startswith(b"HTTP/1.1 ") else "closed"
            statuses[status] += 1
            if status == "500" or not (status in ("200", "closed") or said_why(body)):
                odd.append(answer)

    def run(seed: int) -> None:
        try:
            client(seed)
        except Exception as error:
            odd.append(repr(error).encode())

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    print(f"{sum(statuses.values())} requests in {time.monotonic() - began:.1f} s: {dict(statuses)}")
    print(f"peak memory {before:.0f} to {peak_megabytes(process.pid):.0f} MB")
    assert not odd, odd[:3]
    assert {"200", "422", "413", "403"} <= {*statuses}
    assert peak_megabytes(process.pid) - before < 600

    with ThreadPoolExecutor(24) as pool:  # more at a time than may wait
        answers = list(pool.map(lambda _: exchange(at, request(letter, "/attention"))[:200], range(24)))
    got = Counter(answer.split(b" ")[1].decode() for answer in answers)
    assert {*got} == {"200", "503"} and got["200"] >= 8, got
    assert exchange(at, request(letter)).startswith(b"HTTP/1.1 200 ")
    for connection in idle:  # cut off within the time for a head
        connection.settimeout(100)
        assert connection.recv(1 << 16) == b""
        connection.close()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=150)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "Ended." and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.timeout(900)  # a process that starts takes minutes where others have the cores
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_a_client_is_there(
    server: tuple[subprocess.Popen[str], str, int], number: signal.Signals
) -> None:
    process, host, port = server
    with socket.create_connection((host, port)) as connection:
        connection.sendall(request(bytes(1000))[:400])  # an upload that never ends
        time.sleep(0.5)
        os.kill(process.pid, number)
        _, said = process.communicate(timeout=150)
    assert process.returncode == (0 if number == signal.SIGINT else -number)
    assert "Traceback" not in said, said

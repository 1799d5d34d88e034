"""The server's application, by itself: answers, what it refuses, and how it says so."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vizattn
from vizattn.data import build_transforms, preprocessing_of
from vizattn.engine.evaluate import Trained

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from vizattn.engine.serving.app import create_app
from vizattn.engine.serving.guard import Guard
from vizattn.engine.serving.limits import Limits
from vizattn.engine.serving.model import Busy, OneThread
from vizattn.engine.serving.server import make_server

CLASSES = ["nought", "<b>one</b>", "two"]


@pytest.fixture(scope="module")
def classifier() -> Trained:
    torch.manual_seed(0)
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=3).eval()
    torch.nn.init.normal_(model.get_classifier().weight)  # type: ignore[operator]
    return Trained(model, CLASSES, preprocessing_of(model), None)


@pytest.fixture(scope="module")
def segmenter() -> Trained:
    torch.manual_seed(0)
    backbone = timm.create_model("nat_nano", pretrained=True, features_only=True)
    model = vizattn.Segmenter(backbone, num_classes=3, head="linear").eval()
    preprocessing = preprocessing_of(timm.create_model("nat_nano"))
    config = {"task": "segmentation", "model": {"name": "nat_nano"}, "data": {"name": "scenes"}}
    return Trained(model, CLASSES, preprocessing, config, [[0, 0, 0], [255, 0, 0], [0, 0, 255]])


def serving(trained: Trained, **limits: Any) -> TestClient:
    return TestClient(create_app(trained, "letters <i>", Limits(**limits)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(classifier: Trained) -> Iterator[TestClient]:
    with serving(classifier) as client:
        yield client


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def ask(client: TestClient, data: bytes, path: str = "/predict", **changes: Any) -> Any:
    return client.post(path, files={"image": ("../../etc/passwd", data, "application/x-sh")}, **changes)


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert [*response.json()] == ["error"]
    return response.json()["error"]


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_a_picture_is_classified_as_the_model_does(client: TestClient, classifier: Trained) -> None:
    response = ask(client, encoded(picture(), "PNG"), params={"top_k": 2})
    answer = response.json()
    x = build_transforms(classifier.preprocessing, train=False)(picture())
    with torch.no_grad():
        wanted = classifier.model(x[None])[0].softmax(0)
    order = wanted.argsort(descending=True).tolist()[:2]
    assert [p["class"] for p in answer["predictions"]] == [CLASSES[i] for i in order]
    assert [p["probability"] for p in answer["predictions"]] == pytest.approx(wanted[order].tolist(), abs=1e-6)
    assert (answer["width"], answer["height"], answer["notes"]) == (40, 32, [])


def test_a_picture_is_segmented(segmenter: Trained) -> None:
    with serving(segmenter, segmented_side=64) as client:
        small = ask(client, encoded(picture(size=(48, 40)), "PNG")).json()
        large = ask(client, encoded(picture(size=(128, 96)), "PNG")).json()
        health = client.get("/health").json()
    assert health["task"] == "segmentation"
    mask = np.asarray(opened(small["mask"]))
    assert mask.shape == (40, 48) and opened(small["overlay"]).size == (48, 40)
    colours = dict(zip(CLASSES, segmenter.palette or []))
    for best in small["predictions"]:
        assert best["share"] == pytest.approx((mask == CLASSES.index(best["class"])).mean(), abs=1e-6)
        assert best["colour"] == colours[best["class"]]
    assert sum(best["share"] for best in small["predictions"]) == pytest.approx(1, abs=1e-5)
    assert large["notes"] == ["made smaller, to 64 x 48 pixels"]
    assert (large["width"], opened(large["mask"]).size) == (128, (64, 48))


def test_attention_is_a_page(client: TestClient) -> None:
    response = ask(client, encoded(picture(), "PNG"), "/attention")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "blocks.0.attn" in response.text and "relevance for" in response.text
    assert "<b>one</b>" not in response.text and "passwd" not in response.text


def test_attention_that_is_not_known() -> None:
    model = timm.create_model("resnet10t", num_classes=3).eval()
    with serving(Trained(model, CLASSES, preprocessing_of(model), None)) as client:
        assert "No attention maps are known of ResNet" in error_of(
            ask(client, encoded(picture(), "PNG"), "/attention"), 422
        )
        assert len(ask(client, encoded(picture(), "PNG")).json()["predictions"]) == 3


FRAMES = {"save_all": True, "append_images": [picture().rotate(90), picture().rotate(180)]}
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.mark.parametrize(
    ("data", "size", "notes"),
    [
        (encoded(picture("CMYK"), "JPEG"), (40, 32), 0),
        (encoded(Image.fromarray(np.arange(1280, dtype=np.uint16).reshape(32, 40) * 50), "PNG"), (40, 32), 0),
        (encoded(picture("P"), "PNG"), (40, 32), 0),
        (encoded(picture("RGBA"), "WEBP"), (40, 32), 0),
        (encoded(picture("1"), "BMP"), (40, 32), 0),
        (encoded(picture(), "JPEG", exif=ROTATED), (32, 40), 0),
        (encoded(picture(), "GIF", **FRAMES), (40, 32), 1),
        (encoded(picture(), "WEBP", **FRAMES), (40, 32), 1),
        (encoded(picture(), "PNG", **FRAMES), (40, 32), 1),
        (encoded(picture(), "TIFF", **FRAMES), (40, 32), 1),
    ],
    ids=["cmyk", "16 bit", "palette", "alpha", "1 bit", "rotated", "gif", "webp", "apng", "pages"],
)
def test_odd_pictures(client: TestClient, data: bytes, size: tuple[int, int], notes: int) -> None:
    answer = ask(client, data).json()
    assert (answer["width"], answer["height"]) == size
    assert answer["notes"] == ["only the first of several frames"] * notes
    assert len(answer["predictions"]) == 3


@pytest.mark.parametrize("path", ["/predict", "/attention"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "The file is empty."),
        (b"root:x:0:0", "Not an image file."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Not an image file."),
        (encoded(picture(), "PNG")[:500], "Image file is truncated"),
        (png_of_size(8000, 8000), "8000 x 8000 pixels are more than 50 million."),
        (png_of_size(60000, 60000), "3600000000 pixels are too many to decode."),
        (png_of_size(40, 32), ""),
        (encoded(picture(size=(1, 400)), "PNG"), "1 x 400 pixels: a side is over 100 times the other."),
    ],
    ids=["empty", "text", "postscript", "truncated", "bomb", "larger bomb", "no data", "sliver"],
)
def test_what_is_no_picture(client: TestClient, path: str, data: bytes, message: str) -> None:
    assert message in error_of(ask(client, data, path), 422)


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"data": {"image": "/etc/passwd"}}, 422, "as the field 'image' of a form"),
        ({"files": {"file": b"x"}}, 422, "as the field 'image' of a form"),
        ({"json": {"image": "http://localhost/x.png"}}, 422, "as the field 'image' of a form"),
        ({}, 422, "as the field 'image' of a form"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"--x\r\n\x00:", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, ""),
        ({"content": b"--x\r\nx", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 422, "'image'"),
        ({"files": {"image": encoded(picture(), "PNG")}, "params": {"top_k": 0}}, 422, "top_k: Input should be"),
        ({"files": {"image": encoded(picture(), "PNG")}, "params": {"top_k": "x"}}, 422, "top_k: Input should be"),
    ],
)
def test_what_is_no_upload(client: TestClient, request_: dict[str, Any], status: int, message: str) -> None:
    assert message in error_of(client.post("/predict", **request_), status)


def test_forms_that_are_none_are_no_news(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    make_server(client.app)
    head = {"content-type": "multipart/form-data; boundary=x"}
    error_of(client.post("/predict", content=b"no form", headers=head), 400)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_uploads_have_a_limit_whatever_they_say(classifier: Trained) -> None:
    with serving(classifier, upload_bytes=1 << 20) as client:
        head = {"content-type": "multipart/form-data; boundary=x"}
        start = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        endless = (start if i == 0 else bytes(4096) for i in range(1000))
        response = client.post("/predict", content=endless, headers=head)  # no Content-Length
        assert error_of(response, 413) == "The upload is larger than 1 MB."
        assert response.headers["connection"] == "close"
        assert "larger than" in error_of(ask(client, bytes(1 << 20)), 413)
        assert ask(client, encoded(picture(), "PNG")).status_code == 200


def test_slow_uploads_end() -> None:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        while True:
            await receive()

    async def drop() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    guard = Guard(application, Limits(upload_seconds=0.1), None, "")
    with pytest.raises(HTTPException, match="took longer") as caught:
        asyncio.run(guard({"type": "http", "headers": []}, drop, None))  # type: ignore[arg-type]
    assert caught.value.status_code == 408
    assert guard.running == 0


def test_the_line_before_the_model_is_bounded() -> None:
    async def scene() -> None:
        worker, goes_on, began = OneThread(2, 1), threading.Event(), threading.Event()

        def work() -> int:
            began.set()
            goes_on.wait(10)
            return 7

        first = asyncio.create_task(worker.run(work))
        while not began.is_set():
            await asyncio.sleep(0.001)
        second = asyncio.create_task(worker.run(work))
        await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="Too many"):
            await worker.run(work)
        for late in (first, second):
            with pytest.raises(Busy, match=r"longer than 1 seconds"):
                await late
        worker.seconds = 60
        third = asyncio.create_task(worker.run(work))  # in the place of the second, which never ran
        await asyncio.sleep(0.01)
        with pytest.raises(Busy, match="Too many"):  # the first runs still
            await worker.run(work)
        goes_on.set()
        assert await third == 7
        worker.close()

    asyncio.run(scene())


def test_a_busy_server_says_so(classifier: Trained) -> None:
    with serving(classifier, answer_seconds=0) as client:
        response = ask(client, encoded(picture(), "PNG"))
        assert "took longer" in error_of(response, 503)
        assert response.headers["retry-after"] == "2"
    with serving(classifier, requests=0) as client:
        assert "Too many requests" in error_of(client.get("/health"), 503)


def test_who_may_ask(classifier: Trained) -> None:
    app = create_app(classifier, "x", hosts={"localhost", "127.0.0.1", "::1"})
    client = TestClient(app, base_url="http://localhost:8000")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example:8000", "localhost.evil.example", "", "[::1", "@"):
        assert "another name" in error_of(client.get("/health", headers={"host": host}), 403)
    assert client.get("/health", headers={"origin": "http://localhost:8000"}).status_code == 200
    for origin in ("http://evil.example", "null", "http://[", "http://localhost:8001"):
        assert "Other pages" in error_of(client.get("/health", headers={"origin": origin}), 403)


@pytest.mark.parametrize("length", ["-1", "x", pytest.param("9" * 5000, id="long")])
def test_lengths_that_are_none(client: TestClient, length: str) -> None:
    error_of(client.post("/predict", headers={"content-length": length}), 413)


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/../etc/passwd", "/page.js", "/%00", "/predict"])
def test_nothing_else_is_there(client: TestClient, path: str) -> None:
    response = client.get(path)
    error_of(response, 405 if path == "/predict" else 404)
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_page_loads_nothing_and_has_sane_headers(client: TestClient) -> None:
    response = client.get("/")
    assert "letters &lt;i&gt;" in response.text and "<i>" not in response.text
    assert not [word for word in ("http:", "https:", "src=", "@import", "@NAME") if word in response.text]
    assert re.findall("href=.*?>", response.text) == ['href="data:,">']  # no icon is asked for
    headers = response.headers
    assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert (headers["x-frame-options"], headers["cache-control"]) == ("DENY", "no-store")
    assert not [name for name in headers if name.startswith("access-control")]


def test_a_failure_is_told_without_its_inside(classifier: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("vizattn.engine.serving.model.ServedModel.predict", fail)
    with serving(classifier) as client:
        response = ask(client, encoded(picture(), "PNG"))
        assert "secret" not in error_of(response, 500)
        assert response.headers["x-content-type-options"] == "nosniff"
        assert client.get("/health").json()["status"] == "ok"

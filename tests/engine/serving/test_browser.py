"""The page in a real browser: a picture is chosen, its classes and its attention are shown, mistakes are said."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import vizattn
from vizattn.data import build_dataset, preprocessing_of
from vizattn.engine.evaluate import Trained
from vizattn.engine.report import paragraph, table_html, write_page

pytest.importorskip("uvicorn")
from vizattn.engine.serving.app import create_app
from vizattn.engine.serving.server import bind, make_server

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
CLASSES = ["nought", "<img src=x onerror=alert(1)>", "two"]


class Browser:
    """Chromium with one page, spoken to by the DevTools protocol over two pipes."""

    def __init__(self, profile: Path) -> None:
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command = ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "bash", str(BROWSER), *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(reads, writes), **quiet)  # type: ignore[call-overload]
        os.close(reads)
        os.close(writes)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", "", url="about:blank")["targetId"]
        self.page = self.call("Target.attachToTarget", "", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is None:
            session = self.page
        if session:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                read = os.read(self._in, 1 << 16)
                assert read, "the browser has ended"
                self._buffer += read
            text, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def value(self, expression: str, session: str | None = None) -> Any:
        result = self.call("Runtime.evaluate", session, expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, expression: str, session: str | None = None) -> Any:
        for _ in range(400):
            if value := self.value(expression, session):
                return value
            time.sleep(0.05)
        raise AssertionError(f"{expression} did not come true; the page says: {self.value('document.body.innerText')}")

    def choose(self, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def complaints(self) -> list[str]:
        """Refusals of the content security policy, and errors of scripts."""
        entries = [e["params"]["entry"]["text"] for e in self.events if e.get("method") == "Log.entryAdded"]
        thrown = [str(e["params"]) for e in self.events if e.get("method") == "Runtime.exceptionThrown"]
        return [text for text in entries if "status of 422" not in text] + thrown


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.kill()
    browser.process.wait()


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    listening = bind("127.0.0.1", 0)
    host = f"127.0.0.1:{listening.getsockname()[1]}"
    server = make_server(create_app(request.param(), "letters", hosts={"127.0.0.1"}))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://{host}/"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def classifier() -> Trained:
    torch.manual_seed(0)
    model = timm.create_model("vit_va_nano_patch4_32", pretrained=True, num_classes=3).eval()
    return Trained(model, CLASSES, preprocessing_of(model), None)


def segmenter() -> Trained:
    torch.manual_seed(0)
    backbone = timm.create_model("nat_nano", pretrained=True, features_only=True)
    model = vizattn.Segmenter(backbone, num_classes=3, head="linear").eval()
    config = {"task": "segmentation", "model": {"name": "nat_nano"}, "data": {"name": "scenes"}}
    return Trained(model, CLASSES, preprocessing_of(timm.create_model("nat_nano")), config)


ROWS = "[...document.querySelectorAll('#classes tr')].map((row) => row.innerText.trim().split(/\\s*\\t\\s*/))"
ANSWERED = "!document.getElementById('answer').hidden && document.getElementById('shown').complete"


@pytest.mark.parametrize("served", [classifier], indirect=True)
def test_a_picture_is_classified_and_looked_into(served: str, browser: Browser, tmp_path: Path) -> None:
    browser.events.clear()
    letter = build_dataset("glyphs", "test")[11][0]
    letter.save(tmp_path / "letter.png")
    letter.save(tmp_path / "moving.gif", save_all=True, append_images=[letter.rotate(90), letter.rotate(180)])
    (tmp_path / "no.png").write_text("no picture")
    browser.call("Page.navigate", url=served)
    browser.until("document.readyState === 'complete' && document.getElementById('file') !== null")

    browser.choose(tmp_path / "no.png")
    said = "document.getElementById('state').textContent"
    assert browser.until(said + ".startsWith('Not') && " + said) == "Not an image file."
    assert browser.value("document.getElementById('answer').hidden")

    browser.choose(tmp_path / "moving.gif")
    browser.until(ANSWERED)
    assert browser.value("document.getElementById('about').textContent") == (
        "32 x 32 pixels; only the first of several frames"
    )
    rows = browser.value(ROWS)
    assert sorted(name for name, _ in rows) == sorted(CLASSES)
    shares = [float(number.removesuffix(" %")) for _, number in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)
    widths = browser.value("[...document.querySelectorAll('.bar')].map((bar) => bar.getBoundingClientRect().width)")
    assert widths[1] / widths[0] == pytest.approx(shares[1] / shares[0], abs=0.05)

    browser.choose(tmp_path / "letter.png")
    browser.until(ANSWERED + " && document.getElementById('about').textContent === '32 x 32 pixels'")
    assert browser.value("document.getElementById('shown').naturalWidth") == 32
    browser.value("document.getElementById('attend').click()")
    browser.until("document.getElementById('attention').srcdoc.length > 0")
    inside = evaluator(browser)
    assert inside("document.body.dataset.ready") == "blocks.5.attn"
    assert inside("document.querySelectorAll('#heads button').length") >= 2
    assert inside("document.getElementById('state').textContent").startswith("blocks.5.attn (softmax), mean of heads")
    assert browser.complaints() == []


def test_reports_fit_the_width_of_a_phone(browser: Browser, tmp_path: Path) -> None:
    name = "vit_va_nano_patch4_32_with_a_long_name_of_an_experiment"
    table = table_html(["class", *["recall and precision"] * 5], [[name, *["100.00%"] * 5]])
    write_page(tmp_path / "report.html", name, [(name, table + paragraph(name)), ("Recipe", f"<pre>{name * 3}</pre>")])
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
    try:
        browser.call("Page.navigate", url=(tmp_path / "report.html").as_uri())
        browser.until("document.readyState === 'complete' && document.querySelector('pre') !== null")
        assert browser.value("document.documentElement.scrollWidth") == 360
        assert browser.value("document.querySelector('table').scrollWidth") > 360  # within what scrolls by itself
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("served", [segmenter], indirect=True)
def test_a_picture_is_segmented(served: str, browser: Browser, tmp_path: Path) -> None:
    browser.events.clear()
    Image.effect_noise((50, 40), 90).convert("RGB").save(tmp_path / "noise.jpg")
    browser.call("Page.navigate", url=served)
    browser.until("document.readyState === 'complete' && document.getElementById('file') !== null")
    browser.choose(tmp_path / "noise.jpg")
    browser.until(ANSWERED)
    assert browser.value("document.getElementById('shown').src").startswith("data:image/png;base64,")
    assert browser.value("document.getElementById('shown').naturalWidth") == 50
    rows = browser.value(ROWS)
    assert browser.value("document.querySelectorAll('.swatch').length") == len(rows) > 0
    assert sum(float(number.removesuffix(" %")) for _, number in rows) == pytest.approx(100, abs=0.2)
    assert browser.complaints() == []


def evaluator(browser: Browser) -> Any:
    """Evaluates in the page's frame once that is ready, whether the browser gives it a process of its own or not."""

    def evaluate(expression: str) -> Any:
        apart = [e["params"]["sessionId"] for e in browser.events if e.get("method") == "Target.attachedToTarget"]
        if apart:
            return browser.value(expression, apart[-1])
        frame = browser.call("Page.getFrameTree")["frameTree"]["childFrames"][0]["frame"]["id"]
        context = browser.call("Page.createIsolatedWorld", frameId=frame)["executionContextId"]
        result = browser.call("Runtime.evaluate", expression=expression, contextId=context, returnByValue=True)
        return result["result"].get("value")

    for _ in range(400):
        with suppress(RuntimeError, KeyError, IndexError):  # the frame changes its process, or is not there yet
            if evaluate("document.body?.dataset.ready"):
                return evaluate
        time.sleep(0.05)
    raise AssertionError(f"the frame did not become ready: {browser.complaints()}")

"""The page that shows attention: what it holds, that it needs nothing else, and that it works in a browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vizattn
from vizattn.engine.attention_page import View, encode_map, heat, layer_picture, stored_queries, write_attention
from vizattn.explain import AttentionMap

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """The elements of a page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


def attention_of(name: str, *adapters: str) -> list[AttentionMap]:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=True)
    for adapter in adapters:
        vizattn.attach(model, adapter)
    return vizattn.attention_maps(model, torch.randn(1, 3, 32, 32))


def view(maps: list[AttentionMap], **changes: Any) -> View:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    fields = {"token_names": ["class token"], "predictions": [(HOSTILE, "61.0 %")], "measure": "probability"}
    whole = [("rollout", np.ones((4, 4))), (f"relevance for {HOSTILE}", np.ones((4, 4)))]
    return View(**{"title": HOSTILE, "picture": picture, "maps": maps, "whole": whole, **fields, **changes})


def decode(layer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Weights (heads, rows, keys) and what goes elsewhere (heads, rows)."""
    largest = np.frombuffer(base64.b64decode(layer["largest"]), "<f4").reshape(layer["heads"], -1)
    rows = np.frombuffer(zlib.decompress(base64.b64decode(layer["rows"])), np.uint8)
    away = np.frombuffer(base64.b64decode(layer["away"]), "<f4").reshape(largest.shape)
    return rows.reshape(*largest.shape, -1) / 255 * largest[..., None], away


def near(got: np.ndarray, expected: torch.Tensor) -> None:
    """To half a step of the bytes."""
    wanted = expected.flatten(-2).numpy()
    assert np.abs(got - wanted).max() <= wanted.max() / 509


def test_a_layer_is_kept_in_bytes() -> None:
    attention = attention_of("vit_va_nano_patch4_32", "vpt")[2]
    layer = encode_map(attention, ["class token"], 1 << 20)
    weights, away = decode(layer)
    assert (layer["grid"], layer["queries"], layer["distance"]) == ([8, 8], [8, 8], 1)
    assert weights.shape == (attention.heads, 1 + 1 + 64, 64)
    near(weights[:, 0], attention.mean_received()[0])
    near(weights[:, 1], attention.of_token()[0])
    near(weights[:, 2 + 3 * 8 + 5], attention.of_query(3, 5)[0])
    exact = attention.weights([0])[0, :, 0]
    np.testing.assert_allclose(away[:, 1], exact[:, :1].sum(-1) + exact[:, 65:].sum(-1), rtol=1e-5)


def test_learnt_queries_have_no_place() -> None:
    attention = attention_of("nat_nano", "efficient_probing")[-1]
    layer = encode_map(attention, ["class token"], 1 << 20)
    assert (layer["queries"], layer["tokens"]) == ([0, 0], ["the learnt query of each head"])
    near(decode(layer)[0][:, 1], attention.of_token()[0])


@pytest.mark.parametrize(("seen", "distance"), [(49, 1), (784, 2)])
def test_large_layers_keep_some_of_their_queries(seen: int, distance: int) -> None:
    def rows(queries: torch.Tensor) -> torch.Tensor:
        weights = torch.zeros(1, 2, len(queries), 784)
        weights[..., :seen] = (queries[:, None] + 1).float() / 1e6
        return weights

    grid = (28, 28)
    attention = AttentionMap("a", "agent", grid, grid, 0, 0, torch.zeros(1, 2, 784, 1), rows)
    assert stored_queries(attention, 1 << 20) == distance
    layer = encode_map(attention, [], 1 << 20)
    weights, _ = decode(layer)
    side = -(-28 // distance)
    assert weights.shape[1] == 1 + side * side
    near(weights[:, 1 + 2 * side + 1], attention.of_query(2 * distance, distance)[0])


def test_heat_is_brightest_where_the_weight_is_largest() -> None:
    values = np.zeros((2, 4))
    values[1, 2] = 0.3
    picture = np.asarray(heat(Image.new("RGB", (32, 16), "grey"), values)).astype(int).sum(-1)
    assert picture.shape == (112, 224)  # small pictures are enlarged
    bright = picture == picture.max()
    assert bright[56:, 112:168].all()
    assert bright.sum() == 56 * 56
    assert np.ptp(np.asarray(heat(Image.new("RGB", (300, 300)), np.zeros((3, 3))))[..., 0]) == 0


def test_layer_pictures_have_the_mean_and_each_head() -> None:
    attention = attention_of("nat_nano")[-1]
    sheet = layer_picture(Image.new("RGB", (32, 32)), attention, columns=2)
    rows = -(-(1 + attention.heads) // 2)
    assert sheet.size == (2 * 224 + 4, rows * 228 - 4)


def test_the_page_loads_nothing_and_no_name_breaks_out(tmp_path: Path) -> None:
    maps = attention_of("vit_va_nano_patch4_32", "efficient_probing")
    files = write_attention(view(maps), tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert [f.suffix for f in files] == [".html", *[".png"] * (len(maps) + 2)]
    page = files[0].read_text("utf-8")
    parser = Elements()
    parser.feed(page)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 2
    assert not {"link", "base", "iframe", "object", "embed"} & {*tags}
    attributes = [attribute for _, given in parser.found for attribute in given.items()]
    assert all(value.startswith("data:image/png;base64,") for name, value in attributes if name in ("src", "href"))
    assert not [name for name, _ in attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", page)
    assert HOSTILE not in page
    assert html.escape(HOSTILE) in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [layer["name"] for layer in data["layers"]] == [m.name for m in maps]
    for file in files[1:]:
        Image.open(file).verify()


PROBE = """
<script>
(async () => {
  const wait = () => new Promise((done) => setTimeout(done, 20));
  const out = [], by = (id) => document.getElementById(id);
  const until = async (test) => { for (let i = 0; i < 400 && !test(); i++) await wait(); };
  window.onerror = (message) => out.push("error: " + message);
  const change = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("change")); };
  const say = () => out.push(by("state").textContent);
  await until(() => document.body.dataset.ready);
  say();
  change("layer", "0");
  await until(() => document.body.dataset.ready.includes("0.attn"));
  const box = by("view").getBoundingClientRect();
  by("view").dispatchEvent(new MouseEvent("click",
    { clientX: box.left + box.width * (5.5 / 8), clientY: box.top + box.height * (2.5 / 8) }));
  say();
  change("head", "1");
  say();
  by("view").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown" }));
  say();
  by("heads").children[2].click();
  say();
  change("query", "0");
  say();
  const pressed = [...document.querySelectorAll("#heads [aria-pressed=true]")].map((b) => b.textContent);
  document.body.innerHTML = "";
  const pre = document.createElement("pre");
  pre.id = "said";
  pre.textContent = JSON.stringify([out, pressed]);
  document.body.append(pre);
})();
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_layer_head_and_place_are_chosen_in_a_browser(tmp_path: Path) -> None:
    maps = attention_of("vit_va_nano_patch4_32")
    page = write_attention(view(maps), tmp_path / "page")[0]
    page.write_text(page.read_text("utf-8").replace("</body>", PROBE + "</body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    for _ in range(3):  # on a busy machine the browser's time may run out before its pictures are decoded
        run = subprocess.run(
            [str(BROWSER), *flags, "--virtual-time-budget=20000", "--dump-dom", page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if said := re.search(r'<pre id="said">(.*?)</pre>', run.stdout, re.DOTALL):
            break
    assert said, run.stderr[-2000:]
    out, pressed = json.loads(html.unescape(said[1]))

    first = maps[0]
    shown = [
        (maps[-1], "mean of heads, class token", maps[-1].of_token()[0].mean(0)),
        (first, "mean of heads, row 2, column 5", first.of_query(2, 5)[0].mean(0)),
        (first, "head 2, row 2, column 5", first.of_query(2, 5)[0, 1]),
        (first, "head 2, row 3, column 5", first.of_query(3, 5)[0, 1]),
        (first, "head 3, row 3, column 5", first.of_query(3, 5)[0, 2]),
        (first, "head 3, what places receive", first.mean_received()[0, 2]),
    ]
    assert len(out) == len(shown), out
    for text, (attention, what, weights) in zip(out, shown):
        start, _, rest = text.partition("largest weight ")
        assert start == f"{attention.name} (softmax), {what}: "
        number = re.match(r"[\d.e-]*\d", rest)
        assert number and float(number[0]) == pytest.approx(float(weights.max()), rel=0.01)
    assert pressed == ["head 3"]

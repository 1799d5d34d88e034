"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [layerBox, headBox, queryBox, view, state, gallery] =
    ["layer", "head", "query", "view", "state", "heads"].map((id) => document.getElementById(id));
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);
  const colours = bytes(data.colours);
  const picture = new Image();
  picture.src = data.picture;
  await picture.decode();

  let layer;      // the description of the layer that is shown
  let rows;       // its weights, a byte each: head, row, key
  let largest;    // what 255 means: head, row
  let away;       // what goes to tokens without a place: head, row
  let row = 0;    // 0: what places receive; then tokens; then places
  let head = -1;  // -1: the mean of all
  let loads = 0;

  async function inflate(text) {
    const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function option(box, value, text) {
    const item = document.createElement("option");
    item.value = value;
    item.textContent = text;
    box.append(item);
  }

  const columns = () => Math.ceil(layer.queries[1] / layer.distance);
  const lines = () => Math.ceil(layer.queries[0] / layer.distance);
  const places = () => columns() * lines();
  const count = () => 1 + layer.tokens.length + places();
  const firstPlace = () => 1 + layer.tokens.length;
  const placeOf = (r) => [Math.floor((r - firstPlace()) / columns()), (r - firstPlace()) % columns()];

  // Weights (H * W) of a head, or the mean of all, for a row; and what that row gives to tokens without a place.
  function weights(h, r) {
    const size = layer.grid[0] * layer.grid[1];
    const out = new Float32Array(size);
    let elsewhere = 0;
    const some = h < 0 ? [...Array(layer.heads).keys()] : [h];
    for (const i of some) {
      const at = i * count() + r;
      const unit = largest[at] / 255 / some.length;
      for (let k = 0; k < size; k++) out[k] += rows[at * size + k] * unit;
      elsewhere += away[at] / some.length;
    }
    return [out, elsewhere];
  }

  function draw(canvas, values, width, height) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, 0, 0, width, height);
    const [H, W] = layer.grid;
    const top = values.reduce((a, b) => Math.max(a, b), 0);
    const heat = new ImageData(W, H);
    for (let k = 0; k < H * W; k++) {
      const shade = top > 0 ? Math.round((255 * values[k]) / top) : 0;
      heat.data.set(colours.subarray(3 * shade, 3 * shade + 3), 4 * k);
      heat.data[4 * k + 3] = 153;
    }
    const small = document.createElement("canvas");
    small.width = W;
    small.height = H;
    small.getContext("2d").putImageData(heat, 0, 0);
    context.drawImage(small, 0, 0, width, height);
    return top;
  }

  function rowName(r) {
    if (r === 0) return "what places receive";
    if (r < firstPlace()) return layer.tokens[r - 1];
    const [y, x] = placeOf(r);
    return `row ${y * layer.distance}, column ${x * layer.distance}`;
  }

  function show() {
    const [values, elsewhere] = weights(head, row);
    const scale = Math.max(1, Math.round(448 / Math.max(data.width, data.height)));
    const top = draw(view, values, data.width * scale, data.height * scale);
    if (row >= firstPlace()) {
      const [y, x] = placeOf(row);
      const context = view.getContext("2d");
      const [h, w] = [view.height / layer.queries[0], view.width / layer.queries[1]];
      context.lineWidth = 2;
      context.strokeStyle = "#00e5ff";
      context.strokeRect(x * layer.distance * w + 1, y * layer.distance * h + 1, Math.max(w - 2, 1), Math.max(h - 2, 1));
    }
    const parts = [
      `${layer.name} (${layer.kind}), ${head < 0 ? "mean of heads" : `head ${head + 1}`}, ${rowName(row)}:`,
      `largest weight ${top.toPrecision(3)}`,
    ];
    if (row > 0 && layer.sums && elsewhere > 5e-4) {
      parts.push(`; ${(100 * elsewhere).toFixed(1)} % goes to tokens without a place`);
    }
    state.textContent = parts.join(" ").replace(" ;", ";") + ".";
    queryBox.value = String(Math.min(row, firstPlace()));
    headBox.value = String(head);
    [...gallery.children].forEach((button, h) => {
      draw(button.firstChild, weights(h, row)[0], Math.round((96 * data.width) / data.height), 96);
      button.setAttribute("aria-pressed", String(h === head));
    });
  }

  async function choose(index) {
    const load = ++loads;
    const next = data.layers[index];
    const loaded = await inflate(next.rows);
    if (load !== loads) return;  // another layer was chosen meanwhile
    layer = next;
    rows = loaded;
    largest = floats(layer.largest);
    away = floats(layer.away);
    if (head >= layer.heads) head = -1;
    headBox.replaceChildren();
    option(headBox, -1, `mean of ${layer.heads}`);
    for (let h = 0; h < layer.heads; h++) option(headBox, h, `${h + 1}`);
    queryBox.replaceChildren();
    for (let r = 0; r < firstPlace(); r++) option(queryBox, r, rowName(r));
    if (places() > 0) option(queryBox, firstPlace(), "a place: click on the picture");
    gallery.replaceChildren();
    for (let h = 0; h < layer.heads; h++) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(document.createElement("canvas"), `head ${h + 1}`);
      button.addEventListener("click", () => { head = h; show(); });
      gallery.append(button);
    }
    row = layer.tokens.length > 0 ? layer.tokens.length : 0;
    show();
    document.body.dataset.ready = layer.name;
  }

  function toPlace(y, x) {
    const clamp = (v, n) => Math.min(Math.max(v, 0), n - 1);
    row = firstPlace() + clamp(y, lines()) * columns() + clamp(x, columns());
    show();
  }

  data.layers.forEach((l, i) => option(layerBox, i, `${i + 1}. ${l.name} (${l.kind})`));
  layerBox.addEventListener("change", () => choose(Number(layerBox.value)));
  headBox.addEventListener("change", () => { head = Number(headBox.value); show(); });
  queryBox.addEventListener("change", () => { row = Number(queryBox.value); show(); });
  view.addEventListener("click", (event) => {
    if (places() === 0) return;
    const box = view.getBoundingClientRect();
    const y = Math.floor(((event.clientY - box.top) / box.height) * layer.queries[0]);
    const x = Math.floor(((event.clientX - box.left) / box.width) * layer.queries[1]);
    toPlace(Math.round(y / layer.distance), Math.round(x / layer.distance));
  });
  view.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || places() === 0) return;
    event.preventDefault();
    const [y, x] = row >= firstPlace() ? placeOf(row) : [0, 0];
    toPlace(y + step[0], x + step[1]);
  });
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  const last = data.layers.length - 1;
  layerBox.value = String(last);
  await choose(last);
})();

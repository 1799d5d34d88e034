"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const limit = Number(document.body.dataset.limit);
  let picture = null;  // the file that was chosen last
  let asked = 0;       // answers to older questions are not shown

  function say(text, wrong = false) {
    by("state").textContent = text;
    by("state").classList.toggle("wrong", wrong);
  }

  // The response to a picture; null if there is none, which is said.
  async function ask(path, what) {
    if (picture.size > limit) {
      say(`The file is larger than ${limit / 1048576} MB.`, true);
      return null;
    }
    const question = ++asked;
    const form = new FormData();
    form.append("image", picture);
    say(what);
    let response, answer;
    try {
      response = await fetch(path, { method: "POST", body: form });
      answer = response.ok && path === "attention" ? await response.text() : await response.json();
    } catch (error) {
      answer = { error: `The server did not answer (${error.message}).` };
    }
    if (question !== asked) return null;
    const wrong = answer.error;
    say(wrong || "", Boolean(wrong));
    return wrong ? null : answer;
  }

  function row(best) {
    const [line, name, number, place, bar] = ["tr", "td", "td", "td", "div"].map((tag) => document.createElement(tag));
    const value = best.probability ?? best.share;
    if (best.colour) {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = `rgb(${best.colour})`;
      name.append(swatch);
    }
    name.append(best.class);
    number.textContent = `${(100 * value).toFixed(1)} %`;
    bar.className = "bar";
    bar.style.width = `${100 * value}%`;
    place.append(bar);
    line.append(name, number, place);
    return line;
  }

  async function predict() {
    by("attend").disabled = !picture;
    if (!picture) return;
    by("answer").hidden = by("attention").hidden = true;
    const answer = await ask(`predict?top_k=${Number(by("top").value) || 5}`, "Looking …");
    if (!answer) return;
    URL.revokeObjectURL(by("shown").src);
    by("shown").src = answer.overlay || URL.createObjectURL(picture);
    by("about").textContent = [`${answer.width} x ${answer.height} pixels`, ...answer.notes].join("; ");
    by("classes").replaceChildren(...answer.predictions.map(row));
    by("answer").hidden = false;
  }

  async function attend() {
    by("attend").disabled = true;
    const page = await ask("attention", "Looking at what it looks at …");
    by("attend").disabled = false;
    if (page === null) return;
    by("attention").srcdoc = page;
    by("attention").hidden = false;
  }

  function take(files) {
    if (files.length === 0) return;
    picture = files[0];
    predict();
  }

  by("file").addEventListener("change", (event) => take(event.target.files));
  by("top").addEventListener("change", predict);
  by("attend").addEventListener("click", attend);
  by("ask").addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", name === "dragenter" || name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
})();

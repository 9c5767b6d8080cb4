"""The page of `collection.review`, with placeholders for its title, a line of counts, and the rows as JSON."""

from __future__ import annotations

from blip2.collection.page import page

STYLE = """
header { position: sticky; top: 0; z-index: 1; padding: .75rem 1rem; background: var(--back);
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; }
h1 { margin: 0; font-size: 1.1rem; }
header p { margin: 0; color: var(--dim); font-size: .875rem; }
header form { flex: 1 1 30rem; max-width: 42rem; margin-left: auto; display: flex; flex-wrap: wrap; gap: .5rem; }
input, select, button { font: inherit; font-size: .875rem; color: inherit; background: var(--card);
  padding: .35rem .6rem; border: 1px solid var(--line); border-radius: .4rem; max-width: 100%; }
#words { flex: 1 1 15rem; min-width: 15rem; }
main { padding: 1rem; display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure.failed { border-color: var(--bad); }
.view { display: grid; place-items: center; aspect-ratio: 4 / 3; grid-template: 100% / 100%;
  text-align: center; color: var(--dim); font-size: .875rem;
  background: color-mix(in srgb, var(--line) 30%, transparent); text-decoration: none; }
img { display: block; width: 100%; height: 100%; object-fit: contain; }
figcaption { padding: .5rem .65rem .6rem; overflow-wrap: anywhere; }
figcaption p { margin: 0 0 .35rem; }
figcaption p.question { color: var(--dim); font-size: .875rem; }
figcaption p.error { color: var(--bad); font-size: .875rem; }
figcaption small { display: block; color: var(--dim); font-size: .78rem; font-variant-numeric: tabular-nums; }
figcaption small.times { color: var(--mark); }
figcaption ul { margin: 0 0 .35rem; padding-left: 1.1rem; color: var(--dim); font-size: .875rem; }
footer { padding: 0 1rem 2rem; text-align: center; }
[hidden] { display: none !important; }
"""

BODY = """<header>
<h1>@TITLE@</h1>
<p id="summary" aria-live="polite">@SUMMARY@</p>
<form onsubmit="return false">
<input id="words" type="search" placeholder="words of captions or names" aria-label="Show only images with these words">
<select id="which" aria-label="Which images">
<option value="">all</option><option value="failed">failed</option><option value="success">done</option>
<option value="skipped">skipped</option><option value="times">caption repeated</option>
</select>
<select id="order" aria-label="Order">
<option value="worst">worst score first</option><option value="best">best score first</option>
<option value="name">by name</option><option value="text">by caption</option>
</select>
</form>
</header>
<main id="pictures"></main>
<footer><button id="more" type="button">show more</button></footer>
<noscript><p>This page needs JavaScript. All of it is in this file; nothing is loaded from elsewhere.</p></noscript>
<script type="application/json" id="rows">@ROWS@</script>
<script>
"use strict";
const rows = JSON.parse(document.getElementById("rows").textContent);
const [words, which, order, images, more, summary] =
  ["words", "which", "order", "pictures", "more", "summary"].map(id => document.getElementById(id));
const counts = summary.textContent;
const PORTION = 120;
let shown = [], number = 0;
rows.forEach((row, place) => {
  row.place = place;
  row.said = [row.name, row.text, row.question, row.error, ...(row.others || [])].join("\\n").toLowerCase();
});
const compare = {
  worst: (one, other) => one.place - other.place,
  best: (one, other) => (other.score ?? -Infinity) - (one.score ?? -Infinity) || one.place - other.place,
  name: (one, other) => one.name.localeCompare(other.name, undefined, {numeric: true}),
  text: (one, other) => (one.text || "").localeCompare(other.text || "") || one.place - other.place,
};

function put(parent, tag, text, name) {
  const element = parent.appendChild(document.createElement(tag));
  if (text) element.textContent = text;
  if (name) element.className = name;
  return element;
}

function draw(row) {
  const figure = put(images, "figure", "", row.status);
  const view = put(figure, row.file ? "a" : "div", row.thumb ? "" : "cannot be shown", "view");
  if (row.file) view.href = row.file;
  if (row.thumb) {
    const image = put(view, "img");
    image.loading = "lazy";
    image.alt = row.name;
    image.src = row.thumb;
  }
  const caption = put(figure, "figcaption");
  if (row.question) put(caption, "p", row.question, "question");
  if (row.text) put(caption, "p", row.text);
  if (row.error) put(caption, "p", row.error, "error");
  if (row.others) {
    const list = put(caption, "ul");
    row.others.forEach(text => put(list, "li", text));
  }
  if (row.times) put(caption, "small", `${row.times} images have this caption`, "times");
  const status = row.status === "success" ? (row.score === null ? "" : `score ${row.score}`) : row.status;
  put(caption, "small", [status, row.name].filter(Boolean).join(", "));
}

function extend() {
  const until = Math.min(number + PORTION, shown.length);
  while (number < until) draw(shown[number++]);
  more.hidden = number >= shown.length;
}

function show() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  shown = rows.filter(row =>
    (!which.value || (which.value === "times" ? row.times : row.status === which.value))
    && wanted.every(word => row.said.includes(word)));
  shown.sort(compare[order.value]);
  summary.textContent = shown.length === rows.length ? counts : `${shown.length} of ${counts}`;
  images.replaceChildren();
  number = 0;
  extend();
}

[words, which, order].forEach(input => input.addEventListener("input", show));
more.addEventListener("click", extend);
new IntersectionObserver(seen => { if (seen.some(entry => entry.isIntersecting)) extend(); }, {rootMargin: "600px"})
  .observe(more);
show();
</script>"""

PAGE = page("@TITLE@ - blip2 review", STYLE, BODY)

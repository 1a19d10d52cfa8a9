// Behaviour that HTML alone cannot have: the panel that shows a token's numbers, and the keyboard.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
let held = null; // the token that was clicked; pointing at others then changes nothing

const show = (value) => {
  if (!Number.isFinite(value)) return "–";
  const text = value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3);
  return text.replaceAll("-", "−");
};
const signed = (value) => (value > 0 ? "+" : "") + show(value);

// --- the panel ---

const byHead = (token, heads) => {
  const sums = new Array(heads).fill(0);
  for (const pair of (token.dataset.d ?? "").split(" ").filter(Boolean)) {
    const [head, value] = pair.split(":").map(Number);
    sums[head] += value;
  }
  return sums;
};

const bar = (value, top) => {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "bar");
  svg.setAttribute("viewBox", "0 0 110 10");
  svg.setAttribute("height", "10");
  svg.setAttribute("aria-hidden", "true");
  const length = top ? (55 * Math.abs(value)) / top : 0;
  for (const [kind, x, width] of [["track", 0, 110], [value > 0 ? "pos" : "neg", value > 0 ? 55 : 55 - length, length]]) {
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("class", kind);
    rect.setAttribute("x", x);
    rect.setAttribute("width", width);
    rect.setAttribute("height", 10);
    svg.append(rect);
  }
  return svg;
};

const inspect = (token) => {
  const panel = document.getElementById("inspector");
  const text = token.closest(".text");
  if (!panel || !text) return;
  const part = (name) => panel.querySelector(`[data-part=${name}]`);
  const sums = byHead(token, Number(text.dataset.heads));
  const total = sums.reduce((a, b) => a + b, 0);
  const offset = Number(token.dataset.p) - Number(text.dataset.dest);
  const top = Math.max(...sums.map(Math.abs));
  const word = document.createElement("span");
  word.className = "chip";
  word.textContent = token.textContent.replaceAll(" ", "·");
  part("word").replaceChildren(word);
  part("act").textContent = token.dataset.a ? show(Number(token.dataset.a)) : "0";
  part("dfa").textContent = token.dataset.d ? signed(total) : offset > 0 ? "comes after" : "too small to be kept";
  part("offset").textContent = offset === 0 ? "the destination itself" : offset < 0 ? `${-offset} back` : `${offset} ahead`;
  const rows = sums.map((value, head) => [value, head]).filter(([value]) => value !== 0);
  part("heads").tBodies[0].replaceChildren(
    ...rows.map(([value, head]) => {
      const row = document.createElement("tr");
      row.insertCell().textContent = `head ${head}`;
      row.insertCell().append(bar(value, top));
      const number = row.insertCell();
      number.className = `n ${value > 0 ? "pos" : "neg"}`;
      number.textContent = signed(value);
      return row;
    }),
  );
  part("hint").hidden = true;
  part("facts").hidden = false;
  panel.classList.add("open");
};

const hold = (token) => {
  held?.classList.remove("held");
  held = token;
  held?.classList.add("held");
  if (held) inspect(held);
  else document.getElementById("inspector")?.classList.remove("open");
};

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(".text .t");
  if (token && !held?.isConnected) inspect(token);
});
document.addEventListener("click", (event) => {
  const token = event.target.closest?.(".text .t");
  if (token) hold(token === held ? null : token);
});

// --- the keyboard ---

const follow = (selector) => {
  const link = document.querySelector(selector);
  link?.click();
  return Boolean(link);
};

const along = (text, way) => {
  const tokens = [...text.querySelectorAll(".t")];
  const at = tokens.indexOf(held);
  const start = tokens.findIndex((token) => token.classList.contains("dest"));
  hold(tokens[at < 0 ? Math.max(0, start) : Math.min(tokens.length - 1, Math.max(0, at + way))]);
};

const keys = {
  j: () => follow("main a[rel=next]"),
  k: () => follow("main a[rel=prev]"),
  r: () => follow("#random"),
  a: () => follow("#examples a[data-head=all]"),
  "/": () => (document.querySelector("#jump, #filters input")?.focus(), true),
  "?": () => (document.getElementById("help").showModal(), true),
  Escape: () => (hold(null), false),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  // A dialog keeps the focus until the frame after it closed: a key that comes before then is meant for the page.
  if (event.target.closest("input, textarea, select, dialog[open]")) {
    if (event.key === "Escape" && !event.target.closest("dialog")) event.target.blur();
    return;
  }
  const text = event.target.closest(".text");
  if (text && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
    along(text, event.key === "ArrowRight" ? 1 : -1);
    event.preventDefault();
  } else if (follow(`[data-key="${CSS.escape(event.key)}"]`)) {
    event.preventDefault();
  } else if (/^[0-9]$/.test(event.key)) {
    follow(`.heads a[data-head="${event.key}"]`);
  } else if (keys[event.key]?.()) {
    event.preventDefault();
  }
});

document.getElementById("help-open")?.addEventListener("click", () => document.getElementById("help").showModal());

// After a swap the heads table says which head is painted, the ways to other features keep the view that was chosen, and
// a held token is gone with the old text.
document.addEventListener("htmx:after:swap", () => {
  if (held && !held.isConnected) hold(null);
  const head = new URLSearchParams(location.search).get("head");
  for (const link of document.querySelectorAll(".heads a[data-head]")) {
    link.closest("tr").classList.toggle("chosen", link.dataset.head === head);
  }
  for (const link of document.querySelectorAll("a[rel=prev], a[rel=next]")) link.search = location.search;
});

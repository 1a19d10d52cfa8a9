// Behaviour that HTML alone cannot have: the panel that shows a token's numbers, and the keyboard.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
let held = null; // the token that was clicked; pointing at others then changes nothing
let asked = 0; // how often numbers were asked for: only the last answer is shown

const show = (value) => {
  if (!Number.isFinite(value)) return "–";
  const text = value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3);
  return text.replaceAll("-", "−");
};
const signed = (value) => (value > 0 ? "+" : "") + show(value);

// --- the panel ---

// An example's numbers: with the text where it was typed, else at the example's own address, asked for once.
const known = new WeakMap();
const numbersOf = (text) => {
  if (!known.has(text)) {
    const ask = async () => (await (await fetch(`${text.closest(".example").querySelector(".split").pathname}.json`)).json()).example;
    known.set(text, text.dataset.numbers ? Promise.resolve(JSON.parse(text.dataset.numbers)) : ask());
  }
  return known.get(text);
};

const MARKED = ".text > u, .text > b";
const positionOf = (token) => {
  const text = token.closest(".text");
  const steps = (text.dataset.at ?? "").split(" ").map(Number); // each from the mark before
  return steps.slice(0, [...text.querySelectorAll(MARKED)].indexOf(token) + 1).reduce((a, b) => a + b, 0);
};

// As the server shows a token: nothing of it invisible.
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥", "\0": "␀" };
const seen = (text) => text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => SIGNS[c] ?? `⟨${c.codePointAt(0).toString(16).toUpperCase()}⟩`);

// The position of the token at a character of a text whose unmarked tokens are plain text: they are counted off by their length.
const positionAt = (text, node, offset, numbers) => {
  let before = offset;
  for (let here = node; here !== text; here = here.parentNode) {
    for (let other = here.previousSibling; other; other = other.previousSibling) before += other.textContent.length;
  }
  let [end, begin, position, found] = [0, 0, numbers.start, null];
  for (const part of text.childNodes) {
    end += part.textContent.length;
    if (part.className === "joined") { // one character of several tokens: all are said to be the first
      if (begin > before) return found;
      [found, begin] = [position, end];
      position += parseInt(part.title, 10);
    } else if (part.className === "gap") {
      position += parseInt(part.title, 10);
      begin = end;
    }
    while (begin < end && position - numbers.start < numbers.texts.length) {
      if (begin > before) return found;
      found = position;
      begin += seen(numbers.texts[position - numbers.start]).length;
      position += 1;
    }
  }
  return found;
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

const inspect = async (text, position, word) => {
  const panel = document.getElementById("inspector");
  if (!panel || !text.dataset.at) return;
  const turn = ++asked;
  const numbers = await numbersOf(text).catch(() => null);
  if (turn !== asked || !numbers) return;
  const at = typeof position === "function" ? position(numbers) : position;
  if (at === null) return;
  const part = (name) => panel.querySelector(`[data-part=${name}]`);
  const sums = new Array(numbers.dropped.length).fill(0);
  const entries = numbers.dfa.filter((entry) => entry.src === at);
  for (const { head, value } of entries) sums[head] += value;
  const offset = at - Number(text.dataset.dest);
  const top = Math.max(...sums.map(Math.abs));
  const chip = document.createElement("span");
  chip.className = "chip";
  chip.textContent = (word ?? seen(numbers.texts[at - numbers.start])).replaceAll(" ", "·");
  part("word").replaceChildren(chip);
  part("act").textContent = show(numbers.acts[at] ?? 0);
  const total = sums.reduce((a, b) => a + b, 0);
  part("dfa").textContent = entries.length ? signed(total) : offset > 0 ? "comes after" : "too small to be kept";
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
const inspectToken = (token) => inspect(token.closest(".text"), positionOf(token), token.textContent);

// Below its example: a source split by head, or what earlier components gave, as the link's page has it.
const unfold = (example, address) => {
  let parts = example.querySelector(".parts");
  if (!parts) {
    parts = document.createElement("div");
    parts.className = "parts";
    example.append(parts);
  }
  htmx.ajax("GET", address, { source: example, target: parts, swap: "innerHTML" });
};
const sourcesOf = (example) => example?.querySelector("a.split[href*='/examples/']");

const hold = (token, { split = false } = {}) => {
  held?.classList.remove("held");
  if (!token && held) held.closest(".example")?.querySelector(".parts")?.remove();
  held = token;
  held?.classList.add("held");
  if (!held) return void document.getElementById("inspector")?.classList.remove("open");
  inspectToken(held);
  const link = sourcesOf(held.closest(".example"));
  if (split && link) unfold(held.closest(".example"), `${link.pathname}?source=${positionOf(held)}`);
};

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest?.(MARKED);
  if (token && !held?.isConnected) inspectToken(token);
});
document.addEventListener("pointermove", (event) => {
  if (held?.isConnected || !event.target.matches?.(".text, .text > .nl") || !document.caretPositionFromPoint) return;
  const text = event.target.closest(".text");
  const caret = document.caretPositionFromPoint(event.clientX, event.clientY);
  if (caret && text.dataset.at && text.contains(caret.offsetNode) && caret.offsetNode !== text) {
    inspect(text, (numbers) => numbers.texts ? positionAt(text, caret.offsetNode, caret.offset, numbers) : null);
  }
});
document.addEventListener("click", (event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  const token = event.target.closest?.(MARKED);
  if (token) return hold(token === held ? null : token, { split: true });
  const link = event.target.closest?.("a.split");
  const example = link?.closest(".example");
  if (example) {
    event.preventDefault();
    unfold(example, link.getAttribute("href"));
  }
});

// --- charts: the bar that is pointed at, in words, from the chart's own table ---

document.addEventListener("pointermove", (event) => {
  const svg = event.target.closest?.("figure.bars svg");
  if (!svg) return;
  const rows = svg.parentNode.querySelectorAll("tr");
  const { left, width } = svg.getBoundingClientRect();
  const row = rows[Math.min(rows.length - 1, Math.max(0, Math.floor((rows.length * (event.clientX - left)) / width)))];
  const caption = svg.parentNode.querySelector("figcaption");
  const said = caption.querySelector("b") ?? caption.appendChild(document.createElement("b"));
  said.textContent = row ? ` ${row.cells[0].textContent}: ${row.cells[1].textContent}` : "";
});

// --- the keyboard ---

const follow = (selector) => {
  const link = document.querySelector(selector);
  link?.click();
  return Boolean(link);
};

const along = (text, way) => {
  const tokens = [...text.querySelectorAll(MARKED)];
  const at = tokens.indexOf(held);
  const start = tokens.findIndex((token) => token.tagName === "B");
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
  if (text && event.key === "Enter" && held && text.contains(held)) {
    hold(held, { split: true });
    event.preventDefault();
  } else if (text && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
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

// --- the feature that most likely comes next, asked for ahead ---

// One page: the next, or the one before when that is the way one is going. The browser keeps the answer, and when it goes there
// asks by its ETag whether it still holds: so it need not be made then, and is never out of date. It is asked for as htmx will,
// since answers vary with these headers.
let sent = null;
let came = document.referrer;
const ahead = () => {
  const [next, previous] = ["next", "prev"].map((way) => document.querySelector(`main a[rel=${way}]`));
  const link = next && came !== next.href ? next : previous;
  if (!link || link.href === sent || document.hidden || navigator.connection?.saveData) return;
  sent = link.href;
  const headers = link.closest("[hx-boost\\:inherited]") ? { "HX-Request": "true", "HX-Request-Type": "full" } : {};
  fetch(sent, { priority: "low", headers }).catch(() => {});
};
let walks = false; // to another page in this one's place
document.addEventListener("htmx:before:history:update", () => {
  came = location.href;
  walks = true;
});
const inIdleTime = window.requestIdleCallback ?? ((then) => setTimeout(then, 200));
window.addEventListener("load", () => inIdleTime(ahead));
document.addEventListener("visibilitychange", () => document.readyState === "complete" && inIdleTime(ahead));

// --- a prompt: Ctrl+Enter asks, arrows go from token to token, a cell picks its token ---

document.addEventListener("keydown", (event) => {
  const box = event.target.closest("#ask textarea");
  if (box && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return box.form.requestSubmit(box.form.querySelector("button.main"));
  const row = event.target.closest(".grid button")?.closest("tr");
  const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling }[event.key];
  if (!next) return;
  next.querySelector("button").focus();
  event.preventDefault();
});
document.addEventListener("click", (event) => event.target.closest(".grid td.cell")?.closest("tr").querySelector("button").click());
document.addEventListener("htmx:after:swap", (event) => {
  const picked = event.target.closest?.("#picks, #prompt") && document.querySelector("#picked .fires, #picked .apart");
  if (picked && picked.getBoundingClientRect().bottom < 0) picked.scrollIntoView({ block: "start" });
});

// --- a circuit: a node of the drawing is picked by the step beside it, so that the page stays where it is; arrows go along edges ---

const nodeOf = (element) => element.closest?.("figure.circuit a.node");
document.addEventListener("click", (event) => {
  const node = nodeOf(event.target);
  if (!node || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const step = document.querySelector(`#nodes [data-node="${CSS.escape(node.dataset.node)}"]`);
  if (!step) return;
  event.preventDefault();
  step.click();
});
document.addEventListener("keydown", (event) => {
  const node = nodeOf(event.target);
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!node || !way || event.ctrlKey || event.metaKey || event.altKey) return;
  const middle = (one) => {
    const box = one.querySelector(".hit").getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const svg = node.ownerSVGElement;
  // Down and up go along the strongest edge, which is drawn last; where there is none, and to the sides, to what is nearest.
  const [mine, other] = way[1] > 0 ? ["to", "from"] : ["from", "to"];
  const edges = way[1] ? [...svg.querySelectorAll(`.way[data-${mine}="${CSS.escape(node.dataset.node)}"]`)] : [];
  const at = middle(node);
  const others = [...svg.querySelectorAll("a.node")].filter((one) => one !== node).map((one) => [one, middle(one)]);
  const ahead = others.filter(([, [x, y]]) => way[0] * (x - at[0]) + way[1] * (y - at[1]) > 4);
  const far = ([, [x, y]]) => Math.abs(x - at[0]) * (way[0] ? 1 : 2.5) + Math.abs(y - at[1]) * (way[1] ? 1 : 2.5);
  const end = edges.length && svg.querySelector(`a.node[data-node="${CSS.escape(edges.at(-1).dataset[other])}"]`);
  (end || ahead.sort((a, b) => far(a) - far(b))[0]?.[0])?.focus();
  event.preventDefault();
});

document.addEventListener("click", (event) => event.target.closest?.("#help-open") && document.getElementById("help").showModal());

// Going to another page in place: where it cannot be had so, the browser goes, and says why it could not.
document.addEventListener("htmx:error", ({ detail }) => {
  const link = detail.ctx?.sourceElement;
  if (detail.ctx?.request.headers["HX-History-Restore-Request"]) location.reload();
  else if (link?.matches?.("a[href]")) location.assign(link.href);
});

// After a swap the heads table says which head is painted, the ways to other features keep the view that was chosen, and
// a held token is gone with the old text.
document.addEventListener("htmx:after:swap", ({ detail }) => {
  if (held && !held.isConnected) hold(null);
  if (walks && detail.ctx?.select === "#page") {
    scrollTo(0, 0);
    if (document.activeElement === document.body) document.getElementById("main").focus({ preventScroll: true });
  }
  walks = false;
  const head = new URLSearchParams(location.search).get("head");
  for (const link of document.querySelectorAll(".heads a[data-head]")) {
    link.closest("tr").classList.toggle("chosen", link.dataset.head === head);
  }
  for (const link of document.querySelectorAll("a[rel=prev], a[rel=next]")) link.search = location.search;
  inIdleTime(ahead);
});

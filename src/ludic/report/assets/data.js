"use strict";
// What the other parts use: the page's data, elements made of text, figures in words, the address as state.
// Whatever a run wrote is shown through text nodes alone; nothing here reads it as HTML.

async function unpacked(name) {
  const element = document.getElementById(`data-${name}`);
  const binary = atob(element.textContent);
  const bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place++) bytes[place] = binary.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const unpackedJson = async (name) => JSON.parse(await unpacked(name));

// el("p", {class: "note", onclick: f}, "text", otherElement): attributes, handlers, children.
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (!isKnown(value) || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "colour") made.style.setProperty("--colour", value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(2).filter((child) => child !== null)); // null stands for what is not shown
  return made;
}

const chip = (run) => el("span", { class: "chip", colour: run.colour }, run.name);
const note = (...children) => el("p", { class: "note" }, ...children);
const empty = (text) => el("p", { class: "empty" }, text);
const button = (text, title, onclick) => el("button", { type: "button", title, onclick }, text);

// A column whose cells are all figures is set to the right, with its heading.
function table(headings, rows, attributes = {}) {
  const isFigure = (cell) => typeof cell === "string" && /^([-+]?[\d,.]+(e[-+]?\d+)?( ?%|s)?|-)$/.test(cell);
  const columns = (rows[0] ?? []).map((_, column) => rows.every((row) => isFigure(row[column])));
  const side = (column) => (columns[column] ? "number" : null);
  const head = el("tr", {}, headings.map((text, column) => el("th", { class: side(column), scope: "col" }, text)));
  const body = rows.map((row) => el("tr", {}, row.map((cell, column) => el("td", { class: side(column) }, cell))));
  const parts = headings.length ? [el("thead", {}, head)] : [];
  return el("div", { class: "scroll", tabindex: 0 }, el("table", attributes, parts, el("tbody", {}, body)));
}

const isKnown = (value) => value !== null && value !== undefined;
const percent = (rate) => (isKnown(rate) ? `${(100 * rate).toFixed(1)}%` : "-");

function interval(rate, ci) {
  if (!isKnown(rate) || !ci) return percent(rate);
  return `${percent(rate)} (${(100 * ci[0]).toFixed(1)} to ${(100 * ci[1]).toFixed(1)})`;
}

const count = (value) => (isKnown(value) ? Math.round(value).toLocaleString("en-US") : "-");

function figure(value) {
  if (!isKnown(value)) return "-";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en-US", { maximumSignificantDigits: 4 });
}

function seconds(value) {
  if (!isKnown(value)) return "-";
  if (value < 120) return `${value.toFixed(value < 10 ? 2 : 0)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// A settings value in words; text stays text.
const shown = (value) => (typeof value === "string" && value ? value : JSON.stringify(value) ?? "-");

// The address is the state: #view?name=value. A link to it shows the same thing again.
function address() {
  const [view, query] = location.hash.slice(1).split(/\?(.*)/s);
  return { view: view || "curves", params: new URLSearchParams(query || "") };
}

function link(view, values = {}) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (isKnown(value) && value !== "") params.set(name, value);
  const query = params.toString();
  return `#${view}${query ? `?${query}` : ""}`;
}

// Changes the address: a new entry of the history, or in place of the one that is shown.
function go(hash, { replace = false } = {}) {
  if (location.hash === hash) return;
  if (!replace) { location.hash = hash; return; }
  history.replaceState(null, "", hash);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
}

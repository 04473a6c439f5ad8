// The rollouts: a list of groups that the filters leave, and one group with its members side by side.
// The list has elements for the rows that can be seen only; texts are unpacked a chunk at a time, when they are needed.

const RIGHT = 1, CUT_OFF = 2, NO_ANSWER = 4, NOT_STRICT = 8, GRADER_FAILED = 16, HAS_LOGPROBS = 32;
const TAGS = [[CUT_OFF, "truncated"], [NO_ANSWER, "no answer"], [NOT_STRICT, "not in a box"], [GRADER_FAILED, "grader gave up"]];
const ROW_HEIGHT = 46;
const FILTERS = {
  verdict: {
    "": "any verdict", right: "right", wrong: "wrong", mixed: "mixed groups", none: "groups all wrong", all: "groups all right",
  },
  finish: { "": "any ending", stop: "ended by itself", length: "truncated" },
  answer: {
    "": "any answer", found: "answer found", missing: "no answer found", unboxed: "right, not in a box", grader: "grader gave up",
  },
  tokens: { "": "any group", recorded: "with log-probs" },
  sort: {
    "": "in order", worst: "lowest reward first", best: "highest reward first", longest: "longest first",
    spread: "widest rewards first",
  },
};
const browser = { data: null, elements: null, found: [], matches: null, key: null, search: 0, chunks: new Map() };

function startRollouts(data) {
  browser.data = data;
  for (const source of data.sources) {
    source.first = []; // the place of a group's first member among all members
    let place = 0;
    for (const size of source.size) { source.first.push(place); place += size; }
    source.members = place;
    source.hasLogprobs = source.member_flags.some((flags) => flags & HAS_LOGPROBS);
  }
}

// Chunks stay in memory while they are among the last few that were read.
function chunkOf(source, number) {
  const name = `text-${browser.data.sources.indexOf(source)}-${number}`;
  const known = browser.chunks.get(name) ?? unpackedJson(name);
  browser.chunks.delete(name);
  browser.chunks.set(name, known);
  if (browser.chunks.size > 24) browser.chunks.delete(browser.chunks.keys().next().value);
  return known;
}

const textOf = async (source, group) => (await chunkOf(source, source.chunk[group]))[source.place[group]];

// The advantages of a group's rewards, as `ludic.train.advantages.group_advantages` has them.
function advantages(rewards, scaled) {
  const low = Math.min(...rewards), high = Math.max(...rewards);
  if (high - low <= 1e-9 * Math.max(1, Math.abs(low), Math.abs(high))) return rewards.map(() => 0);
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
  const variance = rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / (rewards.length - 1);
  return rewards.map((reward) => (reward - mean) / (scaled ? Math.sqrt(variance) + 1e-6 : 1));
}

// --- the view --------------------------------------------------------------------------------------------------------

function buildRollouts(view) {
  const list = el("div", {
    class: "list", role: "listbox", tabindex: 0, "aria-label": "Groups", onscroll: drawRows, onkeydown: listKey,
  });
  const spacer = el("div", { class: "spacer" });
  list.append(spacer);
  const form = filterForm();
  const status = el("p", { class: "status", role: "status" });
  const clear = el("button", { type: "button", class: "clear", onclick: clearFilters }, "all groups");
  const detail = el("div", { class: "detail" });
  const side = el("div", { class: "side" }, el("div", { class: "heading" }, status, clear), list);
  view.append(form, el("div", { class: "browser" }, side, detail));
  browser.elements = { form, list, spacer, status, clear, detail };
  new ResizeObserver(drawRows).observe(list);
}

function filterForm() {
  const onchange = (event) => setFilter({ [event.target.name]: event.target.value });
  const select = (name, label, options) => el("select", { name, "aria-label": label, onchange },
    Object.entries(options).map(([value, text]) => el("option", { value }, text)));
  const input = (name, label, placeholder, attributes) => el("input", {
    name, "aria-label": label, title: label, placeholder, autocomplete: "off", onchange, ...attributes,
  });
  const number = { type: "number", step: "any", class: "reward" };
  const sources = Object.fromEntries(browser.data.sources.map((source, place) => [String(place), source.name]));
  return el("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() },
    select("source", "completions of", sources),
    input("q", "text in prompt, target, completion or answer", "text (/)", { type: "search", class: "text" }),
    input("steps", "updates", "updates, 3 or 1-20", { pattern: "\\d+(-\\d*)?", class: "steps" }),
    select("verdict", "verdict", FILTERS.verdict),
    select("finish", "ending", FILTERS.finish),
    select("answer", "answer", FILTERS.answer),
    browser.data.sources.some((source) => source.hasLogprobs) ? select("tokens", "log-probs", FILTERS.tokens) : null,
    input("min", "reward from", "reward \u2265", number),
    input("max", "reward to", "reward \u2264", number),
    select("sort", "order", FILTERS.sort));
}

function setFilter(values) {
  const { params } = address();
  for (const [name, value] of Object.entries(values)) params.set(name, value); // `link` leaves out what is empty
  params.delete("group");
  params.delete("member");
  go(link("rollouts", Object.fromEntries(params)), { replace: !("source" in values) });
}

function clearFilters() {
  const { params } = address();
  go(link("rollouts", { source: params.get("source"), shade: params.get("shade") }));
}

async function showRollouts(params) {
  const { form, clear } = browser.elements;
  for (const field of form.elements) field.value = params.get(field.name) ?? (field.name === "source" ? "0" : "");
  const others = [...params].filter(([name]) => !["source", "group", "member", "shade"].includes(name));
  clear.hidden = !others.length;
  const filters = filtersOf(params);
  const key = JSON.stringify([browser.data.sources.indexOf(filters.source), ...others]);
  if (key !== browser.key) {
    browser.key = key;
    await find(filters);
    if (browser.key !== key) return; // another address came meanwhile
  }
  const group = params.get("group") === null ? browser.found[0] : Number(params.get("group"));
  browser.chosen = group;
  reveal(browser.found.indexOf(group));
  drawRows();
  await showGroup(filters, group, params);
}

async function find(filters) {
  const run = ++browser.search;
  const { source } = filters;
  const indexed = byIndex(filters);
  const show = (found, done) => {
    browser.found = found; browser.source = source; browser.matches = indexed.matches;
    const left = source.total > source.members ? `; the file has ${count(source.total)}, of evenly spread updates these are here` : "";
    browser.elements.status.textContent = done === null
      ? `${count(found.length)} of ${count(source.size.length)} groups, ${count(source.members)} completions${left}`
      : `searching: ${Math.round(done)}%, ${count(found.length)} groups`;
    browser.elements.spacer.style.height = `${found.length * ROW_HEIGHT}px`;
    drawRows();
  };
  let found = sorted(filters, indexed.found);
  if (filters.text) {
    found = await searchTexts(filters, { ...indexed, found: indexed.found }, () => run === browser.search, show);
    if (found === null) return;
    found = sorted(filters, found);
  }
  browser.elements.list.scrollTop = 0;
  show(found, null);
}

// --- the list --------------------------------------------------------------------------------------------------------

function drawRows() {
  const { list, spacer } = browser.elements;
  if (!browser.source || !list.clientHeight) return;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
  const last = Math.min(browser.found.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 8);
  spacer.replaceChildren(...browser.found.slice(first, last).map((group, place) => row(group, first + place)));
}

function row(group, place) {
  const { source } = browser;
  const start = source.first[group];
  const dots = el("span", { class: "dots", "aria-hidden": "true" });
  for (let member = start; member < start + Math.min(source.size[group], 32); member++) {
    dots.append(dot(source.member_flags[member], browser.matches[member]));
  }
  const right = rightOf(source, group);
  const title = nameOf(source, group);
  const snippet = el("span", { class: "snippet" });
  const made = el("div", {
    class: "row",
    role: "option",
    id: `row-${place}`,
    "aria-selected": String(group === browser.chosen),
    "aria-posinset": place + 1,
    "aria-setsize": browser.found.length,
    "aria-label": `${title}: ${right} of ${source.size[group]} right`,
    onclick: () => choose(group),
  }, el("span", { class: "title" }, title, el("span", { class: "share" }, `${right}/${source.size[group]}`)), dots, snippet);
  made.style.transform = `translateY(${place * ROW_HEIGHT}px)`;
  if (group === browser.chosen) browser.elements.list.setAttribute("aria-activedescendant", made.id);
  textOf(source, group).then(([prompt]) => { snippet.textContent = prompt.slice(0, 120); });
  return made;
}

function nameOf(source, group) {
  const number = source.group[group];
  return source.kind === "training" ? `Update ${source.step[group]}, group ${number}` : `Problem ${number}`;
}

function rightOf(source, group) {
  const first = source.first[group];
  return source.member_flags.slice(first, first + source.size[group]).filter((flags) => flags & RIGHT).length;
}

function dot(flags, matched) {
  const shape = flags & RIGHT ? "right" : flags & CUT_OFF ? "cut" : "wrong";
  return el("i", { class: matched ? shape : `${shape} dim` });
}

const choose = (group, replace = false) => {
  const { params } = address();
  params.delete("member");
  go(link("rollouts", { ...Object.fromEntries(params), group }), { replace });
};

function reveal(place) {
  const { list } = browser.elements;
  if (place < 0) return;
  const top = place * ROW_HEIGHT;
  const isSeen = top >= list.scrollTop && top + ROW_HEIGHT <= list.scrollTop + list.clientHeight;
  if (!isSeen) list.scrollTop = Math.max(0, top - list.clientHeight / 3);
}

function move(by) {
  const place = browser.found.indexOf(browser.chosen);
  const next = browser.found[Math.max(0, Math.min(browser.found.length - 1, place + by))];
  if (next !== undefined) choose(next, true);
}

function listKey(event) {
  const page = Math.floor(browser.elements.list.clientHeight / ROW_HEIGHT);
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  move(by);
}

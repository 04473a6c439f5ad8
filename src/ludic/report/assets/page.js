// The page: its views, the theme, the keys.

const page = { data: null, built: new Set(), readouts: [], readStep: null, chosenStep: null };
const VIEWS = ["curves", "time", "rollouts", "evaluations", "settings"];
const KEYS = [
  ["1 to 5", "the parts of the report"],
  ["j, k", "next and previous group"],
  ["arrows", "in the list of groups"],
  ["/", "search in the texts"],
  ["s", "shade tokens by log-prob, by gap, or not"],
  ["[, ]", "update before and after"],
  ["t", "light or dark"],
  ["?", "these keys"],
];

function build(name) {
  if (page.built.has(name)) return;
  page.built.add(name);
  const view = document.getElementById(`view-${name}`);
  if (name === "curves") buildCurves(view, page.data);
  else if (name === "time") buildTime(view, page.data);
  else if (name === "evaluations") buildEvaluations(view, page.data);
  else if (name === "settings") buildSettings(view, page.data);
  else if (page.data.sources.length) buildRollouts(view);
  else view.append(el("p", { class: "empty" }, "There are no completions here."));
}

async function show() {
  const { view, params } = address();
  const name = VIEWS.includes(view) ? view : "curves";
  for (const one of VIEWS) document.getElementById(`view-${one}`).hidden = one !== name;
  for (const anchor of document.querySelectorAll("nav a")) {
    if (anchor.dataset.view === name) anchor.setAttribute("aria-current", "page"); else anchor.removeAttribute("aria-current");
  }
  build(name);
  if (name === "rollouts") { if (page.data.sources.length) await showRollouts(params); return; }
  if (name === "settings") return;
  const isFirst = !charts.drawn.has(name);
  await drawCharts(name);
  if (isFirst && name === "curves") followPointer(name, pointAtCurve, (x) => chooseStep(String(Math.round(x))));
  if (isFirst && name === "time") followPointer(name, pointAtTime, chooseOnTime);
  if (name !== "curves") return;
  showStep(page.data, params);
}

function buildRuns(data) {
  const place = document.getElementById("runs");
  data.runs.forEach((run, number) => {
    const box = el("input", { type: "checkbox", checked: true, onchange: () => showRun(number, box.checked) });
    const title = "Show or hide this run's curves";
    place.append(el("label", { class: "chip", colour: run.colour, title }, data.runs.length > 1 ? box : null, run.name));
  });
  place.append(el("span", { class: "muted" }, `as of ${data.made}`));
}

const systemTheme = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

function changeTheme() {
  const { dataset } = document.documentElement;
  dataset.theme = (dataset.theme ?? systemTheme()) === "dark" ? "light" : "dark";
  colourCharts();
}

function showKeys() {
  const dialog = document.getElementById("keys");
  const rows = KEYS.map(([key, what]) => [el("kbd", {}, key), what]);
  dialog.replaceChildren(el("h2", {}, "Keys"), table([], rows), button("close", null, () => dialog.close()));
  dialog.showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) { if (event.key === "Escape") event.target.blur(); return; }
  const inRollouts = address().view === "rollouts" && page.data.sources.length > 0;
  if (/^[1-5]$/.test(event.key)) location.hash = VIEWS[Number(event.key) - 1];
  else if (event.key === "t") changeTheme();
  else if (event.key === "?") showKeys();
  else if (event.key === "[" || event.key === "]") moveStep(event.key === "]" ? 1 : -1);
  else if (event.key === "/" && inRollouts) { event.preventDefault(); browser.elements.form.elements.q.focus(); }
  else if (inRollouts && event.key === "s") nextShade();
  else if (inRollouts && (event.key === "j" || event.key === "k")) move(event.key === "j" ? 1 : -1);
}

async function start() {
  const status = document.getElementById("loading");
  if (!("DecompressionStream" in window)) {
    status.textContent = "This page needs a browser from 2024 or later: it unpacks its data with DecompressionStream.";
    return;
  }
  try {
    page.data = await unpackedJson("main");
  } catch (error) {
    status.textContent = `This page is damaged, and its data cannot be read (${error.message}): write it again.`;
    return;
  }
  startRollouts(page.data);
  buildRuns(page.data);
  status.remove();
  window.addEventListener("hashchange", show);
  window.addEventListener("keydown", onKey);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colourCharts);
  document.getElementById("theme").addEventListener("click", changeTheme);
  document.getElementById("help").addEventListener("click", showKeys);
  await show();
  document.body.dataset.ready = String(Math.round(performance.now())); // what the benchmark and the tests wait for, in milliseconds
}

start();

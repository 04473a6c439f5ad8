// The curves: runs, alarms, charts whose captions say what is under the pointer, and the metrics of one chosen update.

function buildCurves(view, data) {
  const events = data.runs.flatMap((run) => run.events.map((event) => ({ ...event, run })));
  const grid = el("div", { class: "grid" });
  for (const [metric, title, meaning, isShare] of data.curves) {
    const curves = data.runs.map((run) => curveOf(run, metric));
    if (!curves.some((curve) => curve.size)) continue;
    const said = (value) => (isShare ? percent(value) : figure(value));
    const last = data.runs.map((run, place) => `${run.name} ${said([...curves[place].values()].at(-1))}`).join("; ");
    page.readouts.push({ id: `chart-${metric}`, curves, said });
    grid.append(chartOf(`chart-${metric}`, title, meaning, `${title} over updates; last: ${last}`));
  }
  view.append(
    runTable(data.runs),
    ...(events.length ? [eventList(events, data.runs.length > 1)] : []),
    stepPicker(),
    grid,
    events.length ? note("A dashed line is an alarm or an event; their texts are at the top.") : "",
    el("div", { id: "step-panel" }),
  );
}

// A chart's place, under a heading with a line that says what it is or, under the pointer, its figures.
function chartOf(id, title, meaning, label, { kind = "", above = [], below = [] } = {}) {
  const heading = el("figcaption", {}, el("h3", {}, title), el("p", { class: "meaning" }, meaning),
    el("p", { class: "readout", id: `${id}-readout` }));
  const plot = el("div", { id, class: "plot", role: "img", "aria-label": label });
  return el("figure", { class: `chart ${kind}` }, heading, above, plot, below);
}

// What a run has of a metric: update -> value.
function curveOf(run, metric) {
  if (metric === "accuracy") return new Map(run.evaluations.map((one) => [one.step, one.accuracy]));
  const pairs = run.steps.map((step, place) => [step, run.metrics[metric]?.[place]]);
  return new Map(pairs.filter(([, value]) => isKnown(value)));
}

function runTable(runs) {
  const trained = runs.filter((run) => run.steps.length);
  if (!trained.length) return note("No training here: see Evaluations.");
  const headings = ["run", "state", "updates", "accuracy before", "accuracy now", "reward, last 5", "tokens", "in updates", "events"];
  const add = (values) => (values ?? []).reduce((total, value) => total + (value ?? 0), 0);
  const rows = trained.map((run) => {
    const rewards = run.metrics.reward_mean.slice(-5);
    const [first, last] = [run.evaluations[0], run.evaluations.at(-1)];
    return [
      chip(run),
      run.finished ? "finished" : "no summary yet",
      count(run.steps.at(-1)),
      first === last ? "-" : interval(first.accuracy, first.accuracy_ci95),
      interval(last?.accuracy, last?.accuracy_ci95),
      figure(add(rewards) / rewards.length),
      count(add(run.metrics.total_completion_tokens)),
      seconds(add(run.metrics.step_s)),
      String(run.events.length),
    ];
  });
  return table(headings, rows);
}

function eventList(events, several) {
  const items = events.map((event) => {
    const [, name, message] = /^alarm (\w+): (.*)$/s.exec(event.event) ?? [null, null, event.event];
    const where = el("a", { href: link("curves", { step: event.step }) }, `update ${event.step}`);
    const alarm = name ? el("strong", { class: "alarm" }, name) : null;
    return el("li", {}, where, several ? chip(event.run) : null, alarm, ` ${message}`);
  });
  const heading = events.length > 1 ? `${events.length} alarms and events` : "1 alarm or event";
  const open = events.length <= 4;
  return el("details", { class: "events", open }, el("summary", {}, heading), el("ul", {}, items));
}

// --- under the pointer -----------------------------------------------------------------------------------------------

function pointAtCurve(x, chart) {
  const step = x === null ? null : Math.round(x);
  const pointed = chart.center.find((one) => one.name === "pointed");
  pointed.setv({ visible: step !== null, location: step ?? 0 });
  readOut(step ?? page.chosenStep);
}

// The figures of an update in every caption; without one, what the charts are.
function readOut(step) {
  if (page.readStep === step) return;
  page.readStep = step;
  for (const { id, curves, said } of page.readouts) {
    const values = page.data.runs.map((run, place) => [run, curves[place].get(step)]);
    const chips = values.filter(([, value]) => isKnown(value))
      .map(([run, value]) => el("span", { class: "chip", colour: run.colour, title: run.name }, said(value)));
    say(id, chips.length ? [`update ${step} `, ...chips] : []);
  }
}

function say(id, children) {
  const readout = document.getElementById(`${id}-readout`);
  readout.replaceChildren(...children);
  readout.parentElement.classList.toggle("reading", children.length > 0);
}

// --- the chosen update -----------------------------------------------------------------------------------------------

function stepPicker() {
  const choose = (event) => chooseStep(event.target.value);
  return el("div", { class: "picker" },
    el("label", { for: "step" }, "update "),
    button("\u2190", "Update before ([)", () => moveStep(-1)),
    el("input", { type: "number", min: 0, id: "step", "aria-label": "update", onchange: choose }),
    button("\u2192", "Update after (])", () => moveStep(1)),
    button("whole run", "Undo the zoom (double click)", () => resetZoom("curves")),
    el("span", { class: "muted" }, "click a curve to choose an update, drag to zoom"));
}

function chooseStep(value) {
  const step = value === "" ? null : Number(value);
  go(link("curves", { step }), { replace: address().view === "curves" });
}

function moveStep(by) {
  const steps = page.data.runs.flatMap((run) => run.steps);
  if (!steps.length) return;
  const [low, high] = [steps.reduce((a, b) => Math.min(a, b)), steps.reduce((a, b) => Math.max(a, b))];
  const chosen = address().params.get("step");
  chooseStep(Math.max(low, Math.min(high, chosen === null ? high : Number(chosen) + by)));
}

function showStep(data, params) {
  const step = params.get("step") === null ? null : Number(params.get("step"));
  document.getElementById("step").value = step ?? "";
  page.chosenStep = step;
  markStep(step);
  readOut(step);
  const runs = data.runs.filter((run) => run.steps.includes(step));
  const panel = document.getElementById("step-panel");
  if (step === null) panel.replaceChildren();
  else if (!runs.length) panel.replaceChildren(empty(`no run has an update ${step}`));
  else panel.replaceChildren(stepPanel(data, step, runs));
}

function stepPanel(data, step, runs) {
  const links = data.sources.flatMap((source, place) => {
    if (source.kind !== "training" || !source.step.includes(step)) return [];
    const href = link("rollouts", { source: place, steps: step });
    return [el("a", { href }, `rollouts of ${data.runs[source.run].name}`)];
  });
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].sort();
  const value = (run, name) => figure(run.metrics[name]?.[run.steps.indexOf(step)]);
  const metrics = el("div", { class: `metrics${runs.length > 1 ? " several" : ""}`, tabindex: 0 },
    names.map((name) => el("div", { class: "metric" }, el("span", { class: "name" }, name),
      runs.map((run) => el("span", { class: "value", colour: run.colour }, value(run, name))))));
  metrics.style.setProperty("--runs", runs.length);
  const pager = el("span", { class: "pager" }, links, button("close", "Choose no update", () => chooseStep("")));
  return el("div", { class: "panel" }, el("div", { class: "heading" }, el("h3", {}, `Update ${step}`), pager), metrics);
}

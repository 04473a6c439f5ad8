// Where the seconds went: each update stacked, the timeline of the run, the means in a table.

const PLACED = "An update is placed by its end and its length. The metrics do not record when a part of it began, so its "
  + "parts are drawn one after another, in the order of the legend. ";
const AHEAD = "Completions were generated ahead of their update, and when that began is not recorded: it is not drawn.";
const AT_ONCE = "Generation and grading are drawn from the start of the update.";
const STACKED = "stacked: what the trainer did; the line: how long generation took, which goes on while the trainer waits "
  + "and trains";

function buildTime(view, data) {
  const trained = data.runs.filter((run) => run.steps.length);
  if (!trained.length) view.append(empty("No training here."));
  for (const run of trained) {
    const place = data.runs.indexOf(run);
    if (data.runs.length > 1) view.append(el("h2", {}, chip(run)));
    const lanes = run.ahead ? ["evaluation"] : ["generation", "grading", "evaluation"];
    const last = run.onTimeline < run.steps.length ? `These are the last ${count(run.onTimeline)} updates. ` : "";
    view.append(
      chartOf(`chart-seconds-${place}`, "Seconds of each update", STACKED, "Seconds of each update; the table has the means",
        { kind: "wide", above: legend(data, ["wait", "train", "sync", "other", "generation"]) }),
      chartOf(`chart-timeline-${place}`, "Timeline", "seconds since the start of the first update or evaluation", "Timeline",
        { kind: "wide", above: legend(data, ["wait", "train", "sync", "other", ...lanes]),
          below: note(last, PLACED, run.ahead ? AHEAD : AT_ONCE) }),
      table(["part", "mean s", "of an update"], run.seconds.map(partRow)));
  }
}

const legend = (data, parts) => el("p", { class: "legend" },
  parts.map((part) => chip({ name: part, colour: data.partColours[part] })));

function partRow(row) {
  const name = row.kind === "whole" ? "whole update" : row.name.replace(/_s$/, "");
  return [el("span", { class: row.kind === "phase" ? "phase" : null }, name), row.mean.toFixed(4), percent(row.share)];
}

// The seconds of the update under the pointer. On the timeline it is the one that was made then.
function pointAtTime(x, chart, id) {
  const [, kind, place] = /^chart-(seconds|timeline)-(\d+)$/.exec(id);
  const run = page.data.runs[Number(place)];
  let step = x === null ? null : Math.round(x);
  if (x !== null && kind === "timeline") {
    const { left, right, update, lane } = chart.renderers[0].data_source.data;
    const at = [...left.keys()].find((block) => lane[block] !== "rollouts" && left[block] <= x && x <= right[block]);
    step = at === undefined ? null : update[at];
    if (lane[at] === "evaluation") {
      say(id, [`evaluation after update ${step}: ${seconds(right[at] - left[at])}`]);
      return;
    }
  }
  const row = run.steps.indexOf(step);
  const parts = ["step", "wait", "train", "sync", "generation", "grading"]
    .map((part) => [part, run.metrics[`${part}_s`]?.[row]])
    .filter(([, value]) => isKnown(value));
  say(id, row < 0 ? [] : [`update ${step}: ${parts.map(([part, value]) => `${part} ${seconds(value)}`).join(", ")}`]);
}

function chooseOnTime(x, chart, id) {
  if (id.startsWith("chart-seconds")) go(link("curves", { step: Math.round(x) }));
}

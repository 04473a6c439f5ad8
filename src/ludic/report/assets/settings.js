// What differs between the runs, what each was started with, the proofs of its weight syncs, and every setting.

function buildSettings(view, data) {
  const trained = data.runs.filter((run) => run.steps.length);
  if (trained.length > 1) view.append(el("h2", {}, "What differs"), differences(trained));
  for (const run of trained) view.append(el("h2", {}, chip(run)), table([], facts(run), { class: "facts" }));
  const named = [
    ...data.runs.map((run) => [run.name, run.settings]),
    ...data.evaluations.map((one) => [one.file, one.settings]),
  ].filter(([, settings]) => Object.keys(settings).length);
  named.forEach(([name, settings], place) => {
    const rows = Object.keys(settings).sort().map((key) => [key, el("code", {}, shown(settings[key]))]);
    const heading = el("summary", {}, `Settings of ${name}`);
    view.append(el("details", { open: place === 0 }, heading, table(["setting", "value"], rows)));
  });
  if (!named.length) {
    view.append(empty("The settings are not there: a training writes them at its start, an evaluation beside its records."));
  }
}

function differences(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
  const values = (name) => runs.map((run) => shown(run.settings[name]));
  const rows = names.filter((name) => new Set(values(name)).size > 1).map((name) => [name, ...values(name)]);
  return rows.length ? table(["setting", ...runs.map((run) => run.name)], rows) : empty("No setting differs.");
}

function facts(run) {
  const { command, machine, versions } = run.start;
  const rows = [];
  if (command) {
    const hardware = [machine.system, `${machine.cpu_cores} CPU cores`, ...machine.gpus];
    const packages = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
    rows.push(["command", el("code", {}, command)], ["machine", hardware.join(", ")], ["versions", packages.join(", ")]);
  } else {
    rows.push(["command, machine, versions", "not recorded: the run has no _train_start.json"]);
  }
  rows.push(["proof of the syncs", proofs(run.syncs)]);
  if (run.summary.last_checkpoint) rows.push(["last checkpoint", el("code", {}, run.summary.last_checkpoint)]);
  return rows;
}

// An update has the seconds of a sync once its weights were proven to have arrived.
function proofs(syncs) {
  const said = [`${count(syncs.proven)} of ${count(syncs.updates)} updates have a proven weight sync`];
  if (syncs.probes) {
    said.push(`the log-probs of the probe prompt were compared ${count(syncs.probes)} times, and differed by `
      + `${figure(syncs.largest_gap)} nats at most`);
  }
  said.push(`policy version ${figure(syncs.version)} at the end`);
  if (syncs.recoveries) said.push(`the server was lost and recovered ${count(syncs.recoveries)} times`);
  return said.join("; ");
}

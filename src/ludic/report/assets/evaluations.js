// The evaluations: accuracy under each rule, pass@k and majority votes, what became of the completions, the worst problems.

const RULES_NOTE = "Percent with 95% intervals, under each rule of the environment. Samples of one problem count as one cluster.";
const KIND_FILTERS = {
  right: { verdict: "right" },
  "right, but not in a box": { answer: "unboxed" },
  "wrong answer": { verdict: "wrong", answer: "found" },
  "truncated": { verdict: "wrong", finish: "length" },
  "the grader gave up": { answer: "grader" },
};

function buildEvaluations(view, data) {
  const rules = rulesOf(data);
  const headings = ["run", "when or file", "problems", "samples", "accuracy", ...rules, "no answer", "truncated", "tokens"];
  const rows = [
    ...data.runs.flatMap((run) => run.evaluations.map((one) => duringTraining(run, one, rules))),
    ...data.evaluations.map((one) => ofFile(data.runs[one.run], one, rules)),
  ];
  if (!rows.length) {
    view.append(empty("Nothing has been evaluated."));
    return;
  }
  view.append(table(headings, rows), note(RULES_NOTE));
  const several = data.evaluations.filter((one) => one.samples > 1);
  if (several.length) {
    const meaning = "solid: at least one of k is right; dashed: the most frequent answer of k is right";
    const label = "pass@k and majority votes; the table below has the figures";
    view.append(chartOf("chart-pass-at-k", "pass@k and majority of k", meaning, label, { kind: "wide small" }));
    for (const one of several) {
      const figures = [["pass@k", ...one.pass_at_k.map(percent)], ["majority", ...one.majority_at_k.map(percent)]];
      view.append(table([one.file, ...one.k.map((k) => `k = ${k}`)], figures));
    }
  }
  for (const one of data.evaluations) view.append(...problemsOf(one));
}

// The names of the rules beside the headline's, which is the accuracy itself.
function rulesOf(data) {
  const suffix = "_accuracy";
  const ofRuns = data.runs.flatMap((run) => run.evaluations).flatMap((one) => Object.keys(one))
    .filter((key) => key.endsWith(suffix)).map((key) => key.slice(0, -suffix.length));
  const ofFiles = data.evaluations.flatMap((one) => Object.keys(one.rates).slice(1));
  return [...new Set([...ofRuns, ...ofFiles])];
}

function duringTraining(run, one, rules) {
  const accuracies = ["accuracy", ...rules.map((rule) => `${rule}_accuracy`)];
  const shown = accuracies.map((key) => (key in one ? interval(one[key], one[`${key}_ci95`]) : ""));
  return [run.name, `update ${one.step}`, count(one.num_problems), "1", ...shown, ...ratesOf(one)];
}

function ofFile(run, one, rules) {
  const [headline] = Object.keys(one.rates);
  const shown = [headline, ...rules].map((rule) => (rule in one.rates ? interval(one.rates[rule].rate, one.rates[rule].ci95) : ""));
  const file = one.finished ? one.file : `${one.file} (not finished)`;
  return [run.name, file, count(one.num_problems), count(one.samples), ...shown, ...ratesOf(one)];
}

const ratesOf = (one) => [percent(one.parse_err_rate), percent(one.truncation_rate), figure(one.avg_completion_length)];

function problemsOf(one) {
  const total = one.kinds.reduce((sum, kind) => sum + kind.count, 0);
  const kinds = one.kinds.map(({ kind, count: number }) => {
    const filter = KIND_FILTERS[kind] ?? { verdict: "wrong", answer: "missing" };
    const completions = el("a", { href: link("rollouts", { source: one.source, ...filter }) }, kind);
    return [completions, count(number), percent(number / total)];
  });
  const worst = one.worst.map((row) => [
    el("a", { href: link("rollouts", { source: one.source, group: row.place }) }, String(row.index)),
    `${row.right}/${row.samples}`,
    el("span", { class: "question" }, row.question),
    el("code", {}, String(row.target)),
    el("span", {}, row.wrong.flatMap(([answer, number]) => [el("code", {}, answer), ` \u00d7${number}  `])),
  ]);
  return [
    el("h2", {}, one.file),
    el("h3", {}, "What became of the completions"),
    table(["kind", "completions", "share"], kinds),
    el("h3", {}, "Worst problems"),
    worst.length ? table(["problem", "right", "question", "target", "wrong answers"], worst) : empty("Every completion is right."),
  ];
}

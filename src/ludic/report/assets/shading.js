// Tokens shaded by the sampler's log-prob, or by the trainer's gap to it, where the run recorded them.

const SHADES = { logprob: "log-prob", gap: "gap to the trainer", none: "nothing" };
const FULL_LOGPROB = -4; // nats: p = 0.018
const SMALLEST_FULL_GAP = 0.01; // nats: what is below this is not made to look like much

// What the address asks for, and which number has the full colour; that of gaps is the largest of the group.
function shadingOf(params, members) {
  const by = params.get("shade") in SHADES ? params.get("shade") : "logprob";
  const gaps = members.flatMap(([, , , , spans]) => spans?.[2] ?? []).filter(isKnown).map(Math.abs);
  return { by, full: gaps.reduce((a, b) => Math.max(a, b), SMALLEST_FULL_GAP), hasGaps: gaps.length > 0 };
}

function nextShade() {
  const { params } = address();
  const names = Object.keys(SHADES);
  const by = shadingOf(params, []).by;
  go(link("rollouts", { ...Object.fromEntries(params), shade: names[(names.indexOf(by) + 1) % names.length] }), { replace: true });
}

// The choice, with its legend; says where a run has log-probs if this group has none.
function shadingBar(source, members, shading) {
  if (!source.hasLogprobs) return null;
  if (!members.some(([, , , , spans]) => spans)) {
    const others = el("a", { href: linkTo(source, { tokens: "recorded" }) }, "groups that have them");
    return el("p", { class: "shading muted" }, "The sampler's log-probs were not asked for here: ", others);
  }
  const params = Object.fromEntries(address().params);
  const choices = Object.entries(SHADES).map(([by, name]) => el("a", {
    href: link("rollouts", { ...params, shade: by }), "aria-current": by === shading.by ? "true" : null, title: "Next: s",
  }, name));
  return el("p", { class: "shading" }, el("span", { class: "muted" }, "shade tokens by"),
    el("span", { class: "choices" }, choices), shadeLegend(shading));
}

function shadeLegend({ by, full, hasGaps }) {
  if (by === "none") return null;
  if (by === "gap" && !hasGaps) return el("span", { class: "muted" }, "this group has not been trained on, so it has no gap");
  const ends = by === "logprob"
    ? ["0 nats, certain", `${signed(FULL_LOGPROB)} nats or less, p ${Math.exp(FULL_LOGPROB).toFixed(2)}`]
    : [`${signed(-full)} nats, trainer finds it less likely`, `${signed(full)}, more likely`];
  const [low, high] = ends.map((text) => el("span", { class: "muted" }, text));
  return el("span", { class: "scale" }, low, el("i", { class: `ramp ${by}`, "aria-hidden": "true" }), high);
}

const signed = (value) => `${value < 0 ? "\u2212" : "+"}${figure(Number(Math.abs(value).toPrecision(3)))}`;

// A completion's text, a span for each token; the one under the pointer, or that the arrow keys lead to, is said below it.
function shaded(text, [lengths, logprobs, gaps], shading, query, said) {
  const marks = marksOf(text, query, said);
  let end = 0;
  const tokens = lengths.map((length, place) => {
    const start = end;
    end += length;
    const said = tokenTitle(text.slice(start, end), place, logprobs[place], gaps?.[place]);
    const made = el("span", { class: "token", title: said }, length ? marked(text, marks, start, end) : []);
    const value = shading.by === "gap" ? gaps?.[place] : logprobs[place];
    const strength = Math.min(1, Math.abs(value ?? 0) / (shading.by === "gap" ? shading.full : -FULL_LOGPROB));
    made.style.setProperty("--strength", `${Math.round(60 * strength)}%`);
    if (shading.by === "gap" && value > 0) made.classList.add("more");
    return made;
  });
  let chosen = -1;
  const point = (token) => {
    if (!token) return;
    tokens[chosen]?.classList.remove("pointed");
    chosen = tokens.indexOf(token);
    token.classList.add("pointed");
    token.closest(".card").querySelector(".token-readout").textContent = token.title;
  };
  const under = (event) => point(event.target.closest(".token"));
  const onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    point(tokens[Math.max(0, Math.min(tokens.length - 1, chosen + by))]);
  };
  return el("pre", { tabindex: 0, onpointerover: under, onclick: under, onkeydown }, tokens);
}

function tokenTitle(piece, place, logprob, gap) {
  const known = isKnown(logprob) ? `log-prob ${logprob.toFixed(3)} nats, p ${Math.exp(logprob).toFixed(3)}` : "no log-prob";
  const trainer = isKnown(gap) ? `, trainer ${signed(gap)}` : "";
  return `token ${place + 1} ${piece ? JSON.stringify(piece) : "without text of its own"}: ${known}${trainer}`;
}

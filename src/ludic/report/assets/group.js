// One group: its prompt, its target, and its completions side by side.

async function showGroup(filters, group, params) {
  const { detail } = browser.elements;
  const { source } = filters;
  if (group === undefined || !(group in source.size)) {
    detail.replaceChildren(empty("No group passes these filters."));
    return;
  }
  const [prompt, target, members] = await textOf(source, group);
  if (browser.chosen !== group) return;
  const rewards = source.member_reward.slice(source.first[group], source.first[group] + source.size[group]);
  const computed = source.kind === "training" ? advantages(rewards, source.scale_rewards) : [];
  const shading = shadingOf(params, members);
  const cards = members.map((member, place) => card(filters, group, place, member, target, computed[place], shading));
  const said = ` ${rightOf(source, group)} of ${source.size[group]} right${advantageNote(source, members, rewards)}`;
  detail.replaceChildren(
    el("div", { class: "heading" }, el("h2", {}, nameOf(source, group)), pager(source, group, prompt)),
    el("div", { class: "prompt", tabindex: 0 }, marked(prompt, marksOf(prompt, filters.text).filter(([, , kind]) => kind === "hit"))),
    el("p", { class: "target" }, "target ", el("code", {}, String(target)), el("span", { class: "muted" }, said)),
    shadingBar(source, members, shading),
    el("div", { class: "members" }, cards));
  const named = cards[params.get("member") ?? -1];
  if (named) {
    named.classList.add("named");
    named.scrollIntoView({ block: "nearest" });
  }
}

const linkTo = (source, values) => link("rollouts", {
  source: browser.data.sources.indexOf(source), shade: address().params.get("shade"), ...values,
});

function pager(source, group, prompt) {
  const metrics = { href: link("curves", { step: source.step[group] }), title: "The metrics of this update" };
  const alike = { href: linkTo(source, { q: prompt.slice(0, 80) }), title: "All groups whose prompt begins like this one" };
  return el("span", { class: "pager" },
    button("\u2190", "Previous group (k)", () => move(-1)),
    button("\u2192", "Next group (j)", () => move(1)),
    el("a", { href: linkTo(source, { group }), title: "A link to this group" }, "link"),
    el("a", alike, "same prompt"),
    source.kind === "training" ? el("a", metrics, "metrics") : null);
}

function advantageNote(source, members, rewards) {
  if (source.kind !== "training") return "";
  if (Math.max(...rewards) === Math.min(...rewards)) return "; all rewards are alike, so every advantage is 0";
  if (members.some((member) => member[5] !== null)) return "; advantages as recorded";
  return source.scale_rewards ? "; advantages are (reward - mean) / standard deviation" : "; advantages are reward - mean";
}

function card(filters, group, place, member, target, computed, shading) {
  const { source } = filters;
  const [text, answer, error, parts, spans, recorded, said] = member; // said: by the environment, [start, end] of each
  const at = source.first[group] + place;
  const flags = source.member_flags[at];
  const verdict = flags & RIGHT ? "right" : "wrong";
  const compared = [el("code", {}, answer), flags & RIGHT ? " = " : " \u2260 ", el("code", {}, String(target))];
  const named = source.part_names.map((name, number) => [name, parts[number]]).filter(([, value]) => value);
  const partsShown = named.map(([name, value]) => `; ${name} ${figure(value)}`).join("");
  return el("article", {
    class: `card ${verdict}${browser.matches[at] ? "" : " dim"}`, "aria-label": `completion ${place}, ${verdict}`,
  },
  el("header", {},
    el("a", { href: linkTo(source, { group, member: place }), title: "A link to this completion" }, `#${place}`),
    dot(flags, true),
    el("span", { class: "verdict" }, verdict),
    source.kind === "training" ? rewardOf(source.member_reward[at], recorded, computed) : null,
    TAGS.filter(([bit]) => flags & bit).map(([, name]) => el("span", { class: "tag" }, name))),
  el("p", { class: "answer" }, answer === null ? el("span", { class: "muted" }, error) : compared),
  spans && shading.by !== "none" ? shaded(text, spans, shading, filters.text, said)
    : el("pre", { tabindex: 0 }, marked(text, marksOf(text, filters.text, said))),
  el("footer", {}, el("span", { class: "token-readout" }), `${count(source.member_tokens[at])} tokens, version ${source.member_version[at]}`,
    el("span", { class: "muted" }, partsShown)));
}

function rewardOf(reward, recorded, computed) {
  const advantage = recorded ?? computed;
  const sign = advantage > 0 ? "+" : advantage < 0 ? "\u2212" : "";
  const title = `advantage, ${recorded === null ? "computed from the rewards" : "as recorded"}`;
  return [
    el("span", { class: "figure" }, `reward ${figure(reward)}`),
    el("span", { class: "figure", title }, `adv ${sign}${Math.abs(advantage).toFixed(2)}`),
  ];
}

// Where the boxed answers are: [start, end) of each, braces counted.
function boxes(text) {
  const found = [];
  for (let start = text.indexOf("\\boxed{"); start >= 0; start = text.indexOf("\\boxed{", start + 1)) {
    let depth = 0, end = start + 6;
    for (; end < text.length; end++) {
      if (text[end] === "{") depth++;
      else if (text[end] === "}" && --depth === 0) break;
    }
    found.push([start, Math.min(text.length, end + 1)]);
  }
  return found;
}

// What is marked in a text, as [start, end, kind]: its boxes, an environment's turns, and what was searched for.
function marksOf(text, query, said = []) {
  const marks = boxes(text).map(([start, end]) => [start, end, "box"]);
  marks.push(...said.map(([start, end]) => [start, end, "said"]));
  const lower = text.toLowerCase();
  if (query && lower.length === text.length) {
    for (let at = lower.indexOf(query); at >= 0; at = lower.indexOf(query, at + query.length)) {
      marks.push([at, at + query.length, "hit"]);
    }
  }
  return marks;
}

// A stretch of a text with its marks, as nodes.
function marked(text, marks, from = 0, end = text.length) {
  const inside = marks.filter(([start, stop]) => start < end && stop > from);
  const edges = inside.flatMap(([start, stop]) => [Math.max(start, from), Math.min(stop, end)]);
  const cuts = [...new Set([from, end, ...edges])].sort((a, b) => a - b);
  return cuts.slice(0, -1).map((start, place) => {
    const piece = text.slice(start, cuts[place + 1]);
    const kinds = inside.filter(([first, stop]) => first <= start && stop >= cuts[place + 1]).map(([, , kind]) => kind);
    return kinds.length ? el("mark", { class: [...new Set(kinds)].join(" ") }, piece) : piece;
  });
}

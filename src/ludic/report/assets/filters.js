// What the filters leave: by the index where that is enough, and by the texts for a search.

function filtersOf(params) {
  const number = (name) => (params.get(name) ? Number(params.get(name)) : null);
  const [from, to] = (params.get("steps") || "").split("-");
  return {
    source: browser.data.sources[Number(params.get("source") || 0)] ?? browser.data.sources[0],
    from: from ? Number(from) : -Infinity,
    to: to ? Number(to) : from ? Number(from) : Infinity,
    verdict: params.get("verdict") || "", finish: params.get("finish") || "", answer: params.get("answer") || "", tokens: params.get("tokens") || "",
    low: number("min") ?? -Infinity, high: number("max") ?? Infinity,
    text: (params.get("q") || "").toLowerCase(), sort: params.get("sort") || "",
  };
}

function memberPasses(filters, flags, reward) {
  if (filters.verdict === "right" && !(flags & RIGHT)) return false;
  if (filters.verdict === "wrong" && flags & RIGHT) return false;
  if (filters.finish && (filters.finish === "length") !== Boolean(flags & CUT_OFF)) return false;
  if (filters.answer === "missing" && !(flags & NO_ANSWER)) return false;
  if (filters.answer === "found" && flags & NO_ANSWER) return false;
  if (filters.answer === "unboxed" && !(flags & NOT_STRICT)) return false;
  if (filters.answer === "grader" && !(flags & GRADER_FAILED)) return false;
  if (filters.tokens === "recorded" && !(flags & HAS_LOGPROBS)) return false;
  return reward >= filters.low && reward <= filters.high;
}

// The groups with a member that passes, by the index alone; `matches` marks these members.
function byIndex(filters) {
  const { source } = filters;
  const matches = new Uint8Array(source.members);
  const found = [];
  for (let group = 0; group < source.size.length; group++) {
    if (source.kind === "training" && (source.step[group] < filters.from || source.step[group] > filters.to)) continue;
    let passed = 0, right = 0;
    const first = source.first[group], end = first + source.size[group];
    for (let place = first; place < end; place++) {
      right += source.member_flags[place] & RIGHT;
      matches[place] = memberPasses(filters, source.member_flags[place], source.member_reward[place]) ? 1 : 0;
      passed += matches[place];
    }
    if (filters.verdict === "mixed" && (right === 0 || right === source.size[group])) continue;
    if (filters.verdict === "all" && right < source.size[group]) continue;
    if (filters.verdict === "none" && right > 0) continue;
    if (passed) found.push(group);
  }
  return { matches, found };
}

function sorted(filters, found) {
  if (!filters.sort) return found;
  const { source } = filters;
  const score = (group) => {
    const of = (column) => column.slice(source.first[group], source.first[group] + source.size[group]);
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    if (filters.sort === "longest") return -mean(of(source.member_tokens));
    const rewards = of(source.member_reward);
    if (filters.sort === "spread") return Math.min(...rewards) - Math.max(...rewards);
    return filters.sort === "worst" ? mean(rewards) : -mean(rewards);
  };
  const scores = new Map(found.map((group) => [group, score(group)]));
  return [...found].sort((a, b) => scores.get(a) - scores.get(b) || a - b);
}

const contains = (value, text) => value !== null && value.toLowerCase().includes(text);

// Leaves the groups whose prompt or target, or a member that passed, has the text; shows what it has found meanwhile.
async function searchTexts(filters, { matches, found }, isCurrent, show) {
  const left = [];
  let chunk = -1, pausedAt = performance.now();
  for (const group of found) {
    const { source } = filters;
    if (source.chunk[group] !== chunk) {
      chunk = source.chunk[group];
      if (performance.now() - pausedAt > 100) {
        show(left, (100 * group) / source.size.length);
        await new Promise((resume) => setTimeout(resume));
        pausedAt = performance.now();
      }
    }
    const [prompt, target, members] = (await chunkOf(source, chunk))[source.place[group]];
    if (!isCurrent()) return null;
    if (contains(prompt, filters.text) || contains(String(target), filters.text)) { left.push(group); continue; }
    let passed = false;
    members.forEach(([text, answer, error], member) => {
      const place = source.first[group] + member;
      const has = contains(text, filters.text) || contains(answer, filters.text) || contains(error, filters.text);
      if (!has) matches[place] = 0;
      passed ||= has && matches[place] === 1;
    });
    if (passed) left.push(group);
  }
  return left;
}

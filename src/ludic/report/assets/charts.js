// The charts: Bokeh is unpacked at the first of them, and told the page's colours.

const NONCE = document.body.dataset.nonce;
const charts = { documents: [], loaded: null, drawn: new Map() };

function loadBokeh() {
  charts.loaded ??= unpacked("bokeh").then((code) => {
    // Bokeh makes style elements; the page's policy lets in those that have its nonce.
    const make = document.createElement.bind(document);
    document.createElement = (tag, options) => {
      const made = make(tag, options);
      if (tag === "style") made.nonce = NONCE;
      return made;
    };
    document.head.append(el("script", {}, code));
  });
  return charts.loaded;
}

// Draws a document of charts, once. Their elements must be in the page.
function drawCharts(name) {
  if (!charts.drawn.has(name)) charts.drawn.set(name, draw(name));
  return charts.drawn.get(name);
}

async function draw(name) {
  const [content] = await Promise.all([unpackedJson(`charts-${name}`), loadBokeh()]);
  if (!content.document) return null;
  const before = Bokeh.documents.length;
  const item = { docid: name, roots: content.roots, root_ids: Object.keys(content.roots) };
  await Bokeh.embed.embed_items({ [name]: content.document }, [item]);
  const drawn = Bokeh.documents[before];
  drawn.elementOf = content.roots;
  charts.documents.push(drawn);
  if (matchMedia("(pointer: coarse)").matches) {
    for (const model of modelsOf(drawn, "Toolbar")) model.active_drag = null; // a finger scrolls the page
  }
  colourCharts();
  return drawn;
}

const modelsOf = (drawn, type) => [...drawn._all_models.values()].filter((model) => model.type === type);

function colourCharts() {
  const style = getComputedStyle(document.body);
  const probe = document.querySelector(".brand span");
  const text = getComputedStyle(probe).color;
  const line = getComputedStyle(document.querySelector("header")).borderBottomColor;
  for (const drawn of charts.documents) {
    for (const model of drawn._all_models.values()) {
      if (/Axis$/.test(model.type)) model.setv({ major_label_text_color: text, axis_label_text_color: text });
      else if (model.type === "Grid") model.setv({ grid_line_color: line });
      else if (model.type === "Span") model.setv({ line_color: style.color });
    }
  }
}

// Marks the chosen update in every curve.
async function markStep(step) {
  const drawn = await charts.drawn.get("curves");
  if (!drawn) return;
  const chosen = modelsOf(drawn, "Span").filter((span) => span.name === "chosen");
  for (const span of chosen) span.setv({ visible: step !== null, location: step ?? 0 });
}

// Calls `at(x, chart, element id)` as the pointer moves over a chart and `at(null, ...)` as it leaves; `chosen` for a click.
// Each chart goes back to the whole range by a double click.
async function followPointer(name, at, chosen) {
  const drawn = await charts.drawn.get(name);
  if (!drawn) return;
  for (const chart of modelsOf(drawn, "Figure")) {
    const id = drawn.elementOf[chart.id];
    chart.on_event("mousemove", (event) => at(event.x, chart, id));
    chart.on_event("mouseleave", () => at(null, chart, id));
    chart.on_event("doubletap", () => resetZoom(name));
    if (chosen) chart.on_event("tap", (event) => chosen(event.x, chart, id));
  }
}

async function resetZoom(name) {
  const drawn = await charts.drawn.get(name);
  if (drawn) for (const chart of modelsOf(drawn, "Figure")) Bokeh.index.get_by_id(chart.id).reset();
}

async function showRun(place, visible) {
  const drawn = await charts.drawn.get("curves");
  if (!drawn) return;
  for (const model of modelsOf(drawn, "GlyphRenderer")) if (model.tags.includes(`run-${place}`)) model.visible = visible;
}

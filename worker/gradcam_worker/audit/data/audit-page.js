// The page: what the audit found, tab by tab.

const TILES = 24;  // of a list, before more are asked for
const MATRIX_CLASSES = 24;
const MAX_TEXTS = 60, MAX_NUMBERS = 12;  // values of a column that are chosen from, not typed
const CARDS = 12;  // shown at once; more come as the reader scrolls
const COMPARED = new Set(["class_id", "truth", "cause"]);  // numbers that stand for names

const page = JSON.parse(find("data").textContent);
const { report } = page;
const classes = new Map(report.classes.map((one) => [one.id, one]));
page.causes = page.cause_texts;
page.nameOf = (id) => readable(classes.get(id)?.name) || `class ${id}`;
page.causeOf = (record) => typeof record.cause === "string" ? record.cause : page.cause_names[record.cause] || null;
const embedded = new Map(page.records.map((one) => [keyOf(one), one]));
const rows = new Rows(page);
const notes = new Notes(`gradcam-audit ${report.dataset.uri}`);
const pictures = new Pictures(page);
const look = new Look(page, notes, complain);
const state = { tab: "", filters: [], sort: { column: "", isDown: true } };
let turn = 0;  // of what is being drawn: what was asked for before a later turn is dropped

function complain(error) {
  find("problem")?.remove();
  find("main").prepend(make("p", { id: "problem", role: "alert", textContent: error.message }));
}

// ---------------------------------------------------------------- lists of records

// Of records that the page holds itself.
const embeddedList = (keys) => {
  const own = keys.map((key) => embedded.get(key)).filter(Boolean);
  return { length: own.length, own, at: (index) => seenFully(own[index]) };
};

// With all classes of its image, if rows can be read; else with those that the page holds.
async function seenFully(record) {
  const file = page.files.findIndex(({ first, last }) => first !== null && first <= record.row && record.row <= last);
  if (rows.isOpen && file >= 0) {
    try {
      const found = await rows.record(file, record.row, record.index);
      for (const one of found.beside) {
        const known = embedded.get(keyOf(one));
        if (known) Object.assign(one, { photo: known.photo, cause: known.cause });
        else one.photo = record.photo;
      }
      return found;
    } catch { /* the page's own record is shown */ }
  }
  return { own: record, beside: page.records.filter(({ row }) => row === record.row) };
}

const placesList = (places) => ({ length: places.length, at: (index) => rowAt(places[index]) });

async function rowAt(place) {
  const [[found], link] = await Promise.all([rows.records([place]), rows.link(place).catch(() => null)]);
  if (link) for (const one of found.beside) one.link = link;
  const cause = page.columns.some(({ name }) => name === "cause") ? (await rows.column("cause"))[place] : null;
  if (cause !== null && cause >= 0) found.own.cause = cause;
  const known = embedded.get(keyOf(found.own));
  if (known) for (const one of found.beside) one.photo = known.photo;
  return found;
}

function tilesOf(list, most = Infinity) {
  const tiles = make("div", { className: "tiles" });
  list.own.slice(0, most).forEach((record, index) => tiles.append(pictures.tile(record, notes, () => look.open(list, index))));
  return tiles;
}

// ---------------------------------------------------------------- parts

function bars(causes) {
  const bar = make("div", { className: "bars", role: "img", "aria-label": causesText(causes) });
  for (const cause of page.cause_names) {
    if (causes[cause]) bar.append(make("span", { "--color": `var(--${cause})`, "--share": causes[cause], title: `${page.causes[cause]}: ${whole(causes[cause])}` }));
  }
  return bar;
}

const causesText = (causes) => page.cause_names.filter((cause) => causes[cause])
  .map((cause) => `${page.causes[cause]} ${whole(causes[cause])}`).join(", ");

// What the colours mean; of how many images each share is, if that is known.
function causeLegend(causes, judged) {
  const legend = make("div", { className: "legend" });
  for (const cause of page.cause_names) {
    if (causes && !causes[cause]) continue;
    legend.append(make("span", {}, make("span", { className: "dot", "--color": `var(--${cause})` }), page.causes[cause],
      causes ? make("b", { textContent: percent(causes[cause] / judged) }) : null));
  }
  return legend;
}

function heatOf({ rows: count, columns, cells }) {
  const bytes = Uint8Array.from(atob(cells), (letter) => letter.charCodeAt(0));
  return { rows: count, columns, cells: Float32Array.from(bytes, (value) => value / 255) };
}

const rowsButton = (text, filters, sort) => make("button", { className: "button", type: "button", textContent: text,
  onclick: () => go("rows", { filters, sort }) });

const named = (one) => one.name ? `${one.id} ${readable(one.name)}` : `class ${one.id}`;

// Cards that are made as the reader comes near them.
function inTurn(list, makeCard, parent) {
  let at = 0;
  const end = make("div");
  const more = () => {
    for (const one of list.slice(at, at + CARDS)) end.before(makeCard(one));
    at += CARDS;
    if (at >= list.length) watch.disconnect();
  };
  const watch = new IntersectionObserver((entries) => { if (entries.some(({ isIntersecting }) => isIntersecting)) more(); }, { rootMargin: "900px" });
  parent.append(end);
  more();
  watch.observe(end);
}

function empty(text, ...more) {
  return make("div", { className: "empty" }, make("p", { textContent: text }), ...more);
}

// ---------------------------------------------------------------- the gallery: class by class

const GALLERY_ORDERS = {
  "most to learn": () => 0,
  "most images": (a, b) => b.predicted - a.predicted,
  "least accurate": (a, b) => (a.accuracy ?? 2) - (b.accuracy ?? 2),
  "most heat at the border": (a, b) => (b.mean_heat_at_border ?? -1) - (a.mean_heat_at_border ?? -1),
  "name": (a, b) => a.name.localeCompare(b.name),
};

function classCard(one) {
  const facts = [`predicted for ${counted(one.predicted, "image")}`];
  if (one.accuracy !== null) facts.push(`finds ${percent(one.accuracy)} of its ${counted(one.truths, "image")}`);
  if (one.precision !== null) facts.push(`${percent(one.precision)} of its predictions are right`);
  const card = make("section", { className: "card" }, make("header", {}, make("div", {}, make("h2", { textContent: named(one) }),
    make("p", { className: "quiet", textContent: facts.join(" \u00b7 ") })),
    page.table.records && one.predicted ? rowsButton(`All ${whole(one.predicted)}`, [is("class_id", one.id), is("rank", 1)], { column: "probability", isDown: true }) : null));
  const aside = make("aside");
  if (one.typical_heat) {
    aside.append(make("figure", {}, pictures.plain(heatOf(one.typical_heat), `Typical heat of ${named(one)}`), make("figcaption", { className: "hidden-on-phone", textContent: "Typical heat, to its own peak" })));
  }
  aside.append(bars(one.causes));
  for (const [label, value] of [["heat inside the object", one.mean_heat_inside], ["heat at the border", one.mean_heat_at_border]]) {
    if (value !== null) aside.append(make("p", { className: "quiet", textContent: `${percent(value)} ${label}` }));
  }
  const groups = make("div", { className: "groups" });
  for (const [cause, keys] of Object.entries(page.groups.causes[one.id] || {})) {
    const list = embeddedList(keys);
    if (!list.length) continue;
    groups.append(make("div", {}, make("h3", {}, make("span", { className: "dot", "--color": `var(--${cause})` }), `${sentence(page.causes[cause])}: ${whole(one.causes[cause])}`), tilesOf(list)));
  }
  for (const [title, keys] of Object.entries(page.groups.confidence[one.id] || {})) {
    const list = embeddedList(keys);
    if (list.length) groups.append(make("div", {}, make("h3", { textContent: title }), tilesOf(list)));
  }
  if (!groups.childElementCount) groups.append(make("p", { className: "quiet", textContent: one.predicted ? "Its images are not on this page: see all rows." : "No image is predicted as this class." }));
  card.append(make("div", { className: "split" }, aside, groups));
  return card;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const is = (column, value) => ({ column, operator: "is", value });

function galleryTab(main) {
  const search = make("input", { className: "field", type: "search", placeholder: "Find a class", "aria-label": "Find a class" });
  const order = make("select", { className: "field", "aria-label": "Order of the classes" }, ...Object.keys(GALLERY_ORDERS).map((name) => make("option", { value: name, textContent: name })));
  const found = make("span", { className: "quiet" }), cards = make("div");
  const draw = () => {
    const typed = search.value.trim().toLowerCase();
    const list = report.classes.filter((one) => `${one.id} ${readable(one.name)} ${one.wnid}`.toLowerCase().includes(typed)).sort(GALLERY_ORDERS[order.value]);
    found.textContent = counted(list.length, "class", "classes");
    cards.replaceChildren();
    if (list.length) inTurn(list, classCard, cards);
    else cards.append(empty("No class has that name or number."));
    pictures.tidy();
  };
  search.addEventListener("input", draw);
  order.addEventListener("change", draw);
  main.append(make("div", { className: "controls" }, search, order, found), cards);
  draw();
}

// ---------------------------------------------------------------- confusions

function confusionsTab(main) {
  const { confusions } = report;
  if (!confusions.length) {
    main.append(empty(report.dataset.labelled ? "No image with a label is predicted as another class."
      : "Without labels it is not known which predictions are wrong. Give them: gradcam backfill --label COLUMN."));
    return;
  }
  main.append(matrixCard(confusions));
  const list = make("div");
  main.append(list);
  inTurn(confusions, confusionCard, list);
  if (report.confusions_left_out) list.append(make("p", { className: "quiet", textContent: `${whole(report.confusions_left_out)} more pairs are in the rows: filter by truth.` }));
}

const pairFilters = ({ truth, predicted }) => [is("truth", truth), is("class_id", predicted), is("rank", 1)];

function confusionCard(one) {
  const list = embeddedList(one.examples.map(([row, index]) => `${row}:${index}`));
  const card = make("section", { className: "card" }, make("header", {}, make("div", {},
    make("h2", { className: "pair" }, make("span", { textContent: page.nameOf(one.truth) }), make("span", { className: "arrow", textContent: "is taken for" }), make("span", { textContent: page.nameOf(one.predicted) })),
    make("p", { className: "quiet", textContent: `${counted(one.images, "image")}, ${percent(one.share)} of the class \u00b7 ${causesText(one.causes)}` })),
    page.table.records ? rowsButton(`All ${whole(one.images)}`, pairFilters(one), { column: "probability", isDown: true }) : null), bars(one.causes));
  if (list.length) card.append(tilesOf(list));
  return card;
}

function matrixCard(confusions) {
  const most = (name) => {
    const sums = new Map();
    for (const one of confusions) sums.set(one[name], (sums.get(one[name]) || 0) + one.images);
    return [...sums].sort((a, b) => b[1] - a[1]).map(([id]) => id);
  };
  const allTruths = most("truth"), truths = allTruths.slice(0, MATRIX_CLASSES);
  const predictions = [...new Set([...truths, ...most("predicted")])].slice(0, MATRIX_CLASSES + 4);
  const counts = new Map(confusions.map((one) => [`${one.truth} ${one.predicted}`, one]));
  const head = make("tr", {}, make("th", { textContent: "truth \u2193 \u00b7 predicted \u2192" }),
    ...predictions.map((id) => make("th", { scope: "col" }, make("span", { textContent: page.nameOf(id), title: page.nameOf(id) }))));
  const body = truths.map((truth) => make("tr", {}, make("th", { scope: "row", textContent: page.nameOf(truth), title: page.nameOf(truth) }), ...predictions.map((predicted) => {
    const one = truth === predicted ? { truth, predicted, images: classes.get(truth)?.right ?? 0, share: classes.get(truth)?.accuracy ?? 0 } : counts.get(`${truth} ${predicted}`);
    if (!one?.images) return make("td", {}, make("span"));
    const part = Math.round(100 * Math.sqrt(Math.min(one.share, 1)));
    return make("td", {}, make("button", { type: "button", textContent: one.images < 1000 ? one.images : `${Math.round(one.images / 1000)}k`,
      "--color": truth === predicted ? "var(--right_reason)" : "var(--wrong_elsewhere)", "--part": `${Math.max(part, 8)}%`,
      "--text": part > 62 ? "#fff" : "inherit",
      "aria-label": `${page.nameOf(truth)} predicted as ${page.nameOf(predicted)}: ${counted(one.images, "image")}`,
      title: `${page.nameOf(truth)} \u2192 ${page.nameOf(predicted)}: ${counted(one.images, "image")}, ${percent(one.share)}`,
      onclick: () => go("rows", { filters: pairFilters(one), sort: { column: "probability", isDown: true } }) }));
  })));
  const more = allTruths.length > truths.length ? ` The ${truths.length} of ${whole(allTruths.length)} classes that are confused most.` : "";
  return make("section", { className: "card" }, make("header", {}, make("div", {}, make("h2", { textContent: "Confusion matrix" }),
    make("p", { className: "quiet", textContent: `Choose a cell to see its images. Colour: share of the true class.${more}` }))),
    make("div", { className: "matrix", tabIndex: 0, role: "region", "aria-label": "Confusion matrix", "--cell": `${Math.min(58, Math.max(30, Math.floor(900 / predictions.length)))}px` }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body))));
}

// ---------------------------------------------------------------- shortcuts

const TOLD_FROM = { boxes: "told from the object by its boxes", other_classes: "other classes are not looked at there" };

function shortcutsTab(main) {
  const { shortcuts, suspects, masking } = report;
  main.append(make("p", { className: "controls quiet", textContent: page.shortcut_note }));
  if (!shortcuts.length && !suspects.length) {
    main.append(empty(masking.left_out ? "No region besides the object was conspicuous." : "No region besides the object has an effect on what the network says."));
    return;
  }
  const tested = make("div");
  main.append(tested);
  if (shortcuts.length) inTurn(shortcuts, shortcutCard, tested);
  if (!suspects.length) return;
  const untested = make("div");
  main.append(make("h2", { className: "controls", textContent: "Not tested: these are correlations only" }), untested);
  inTurn(suspects, shortcutCard, untested);
}

function shortcutCard(one) {
  const facts = [`${counted(one.images, "image")} of a sample, ${percent(one.share)}`, `${percent(one.heat_share)} of their heat lies there`, TOLD_FROM[one.basis]];
  if (one.accuracy !== null) facts.push(`${percent(one.accuracy)} of them are right${one.other_accuracy === null ? "" : `, of the others ${percent(one.other_accuracy)}`}`);
  const card = make("section", { className: "card" }, make("header", {}, make("div", {},
    make("h2", { textContent: `${page.nameOf(one.class_id)}: ${one.place}` }), make("p", { className: "quiet", textContent: facts.filter(Boolean).join(" \u00b7 ") }))));
  if (one.effect !== undefined) card.append(effectOf(one));
  const aside = make("aside"), telling = make("div");
  if (one.heat) aside.append(make("figure", {}, pictures.plain(heatOf(one.heat), "Where their heat lies"), make("figcaption", { textContent: "Where their heat lies" })));
  if (one.region) aside.append(make("figure", {}, pictures.plain(heatOf(one.region), "The region"), make("figcaption", { textContent: one.effect === undefined ? "The region" : "What was masked" })));
  const list = embeddedList(one.examples.map(([row, index]) => `${row}:${index}`));
  if (list.length) telling.append(tilesOf(list));
  card.append(make("div", { className: "split" }, aside, telling));
  return card;
}

// How far the class's probability falls, as bars with the interval of the effect.
function effectOf({ effect, confidence_interval: [low, high], confidence, fall_blurred: blurred, fall_filled: filled, fall_elsewhere: elsewhere, probability, masked }) {
  const bar = (label, value, className) => make("div", { className: "fall" }, make("span", { textContent: label }), make("span", { className: "track" },
    make("span", { className, "--part": `${Math.max(0, Math.min(100, 100 * value))}%` })), make("b", { textContent: percent(value) }));
  return make("div", { className: "falls" },
    make("p", {}, "Masked here, the class loses ", make("b", { textContent: percent(effect) }), ` more of its probability than masked elsewhere (${percent(low)} to ${percent(high)}, confidence ${percent(confidence)}; ${counted(masked, "image")}, probability ${percent(probability)} before).`),
    bar("blurred here", blurred, "here"), bar("filled here", filled, "here"), bar("masked elsewhere", elsewhere, "there"));
}

// ---------------------------------------------------------------- the map

const MAP_COLORS = ["#4c78d0", "#d98a1d", "#1f9d7a", "#d6455d", "#7d6bd6", "#2ba6b8", "#b5692c", "#c55aa5", "#7a9a2e", "#8a8f98"];

function clusterOf(known, color, count, button, title = "") {
  const text = known ? known.place : "in no cluster";
  const card = make("div", { className: "cluster" }, known ? pictures.plain(heatOf(known.heat), `Heat of the cluster: ${text}`) : make("span"), make("div", {},
    make("h3", {}, make("span", { className: "dot", "--color": color }), title ? `${title}: ${text}` : text),
    make("p", { className: "quiet", textContent: [counted(count, "image"), known?.accuracy === null || !known ? null : `${percent(known.accuracy)} right`,
      known?.heat_inside === null || !known ? null : `${percent(known.heat_inside)} of the heat inside`].filter(Boolean).join(" \u00b7 ") }), button));
  return card;
}

async function mapTab(main, mine) {
  if (!page.columns.some(({ name }) => name === "x")) {
    main.append(empty("This audit has no map of what the network looks at."));
    return;
  }
  if (!rows.isOpen) {
    main.append(folderCard());
    const cards = make("div", { className: "groups" });
    main.append(make("h2", { className: "controls", textContent: "Clusters" }), cards);
    inTurn(report.clusters, (one) => clusterOf(one, MAP_COLORS[one.number % MAP_COLORS.length], one.images, null, page.nameOf(one.class_id)), cards);
    return;
  }
  main.append(make("p", { className: "quiet", textContent: "Reading\u2026" }));
  const [x, y, cluster, classIds] = await Promise.all(["x", "y", "cluster", "class_id"].map((name) => rows.column(name)));
  if (mine !== turn) return;
  const placed = [];
  for (let place = 0; place < rows.count; place++) if (!Number.isNaN(x[place])) placed.push(place);
  const counts = new Map();
  for (const place of placed) counts.set(classIds[place], (counts.get(classIds[place]) || 0) + 1);
  const choose = make("select", { className: "field", "aria-label": "Class" }, ...[...counts].sort((a, b) => b[1] - a[1])
    .map(([id, count]) => make("option", { value: id, textContent: `${page.nameOf(id)} (${whole(count)})` })));
  const canvas = make("canvas", { id: "plot", role: "img" }), side = make("div", { className: "groups" });
  main.replaceChildren(make("div", { className: "controls" }, choose, make("span", { className: "quiet", textContent: "Each dot is an image; near ones are looked at alike." })),
    make("div", { className: "map" }, canvas, side));
  let dots = [];
  const draw = () => {
    const own = placed.filter((place) => classIds[place] === Number(choose.value));
    const spread = (values) => own.reduce(([least, most], place) => [Math.min(least, values[place]), Math.max(most, values[place])], [Infinity, -Infinity]);
    const [left, right] = spread(x), [top, bottom] = spread(y), scale = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    const context = canvas.getContext("2d"), margin = 22 * scale, radius = Math.max(2, Math.min(6, 160 / Math.sqrt(own.length))) * scale;
    const at = (value, least, most, size) => margin + (most > least ? (value - least) / (most - least) : 0.5) * (size - 2 * margin);
    dots = own.map((place) => [at(x[place], left, right, canvas.width), at(y[place], top, bottom, canvas.height), place]);
    const clusters = [...new Set(own.map((place) => cluster[place]))].sort((a, b) => a - b);
    const colorOf = (place) => cluster[place] < 0 || Number.isNaN(cluster[place]) ? "#8a8f98" : MAP_COLORS[clusters.indexOf(cluster[place]) % MAP_COLORS.length];
    context.globalAlpha = 0.75;
    for (const [dotX, dotY, place] of dots) {
      context.fillStyle = colorOf(place);
      context.beginPath();
      context.arc(dotX, dotY, radius, 0, 2 * Math.PI);
      context.fill();
    }
    canvas.setAttribute("aria-label", `${counted(own.length, "image")} in ${counted(clusters.length, "cluster")}`);
    side.replaceChildren(...clusters.map((one) => {
      const members = own.filter((place) => cluster[place] === one);
      const known = report.clusters.find(({ class_id: id, number }) => id === Number(choose.value) && number === one);
      return clusterOf(known, colorOf(members[0]), members.length, one < 0 || Number.isNaN(one) ? null
        : rowsButton("Show them", [is("class_id", Number(choose.value)), is("cluster", one)], { column: "probability", isDown: true }));
    }));
  };
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    const [pointX, pointY] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const far = ([dotX, dotY]) => (dotX - pointX) ** 2 + (dotY - pointY) ** 2;
    const ordered = dots.slice().sort((a, b) => far(a) - far(b));
    if (ordered.length && far(ordered[0]) < (24 * scale) ** 2) look.open(placesList(ordered.map(([, , place]) => place)), 0);
  });
  choose.addEventListener("change", draw);
  new ResizeObserver(() => { if (canvas.isConnected && canvas.clientWidth) draw(); }).observe(canvas);
}

// ---------------------------------------------------------------- all rows

function folderCard() {
  return empty("A page that is opened from a disk may not read the files beside it. Choose the dataset's folder, and this page shows every row. Nothing leaves your computer. "
    + "A page that comes from a web server does not ask.", make("button", { className: "button strong", type: "button", textContent: "Choose the dataset\u2019s folder", onclick: () => find("folder").click() }));
}

const columnLabel = (name) => ({ class_id: "predicted class", truth: "true class", index: "place among the explained", id: "id" })[name] || readable(name);

function filterRow(filter, change) {
  const { kind } = page.columns.find(({ name }) => name === filter.column);
  const column = make("select", { "aria-label": "Column" }, ...page.columns.filter(({ name }) => name !== "file").map(({ name }) => make("option", { value: name, textContent: columnLabel(name), selected: name === filter.column })));
  const isNamed = COMPARED.has(filter.column);
  const operator = make("select", { "aria-label": "Comparison" }, ...Object.keys(OPERATORS[kind]).filter((name) => !isNamed || name.startsWith("is"))
    .map((name) => make("option", { value: name, textContent: name, selected: name === filter.operator })));
  const box = make("span", { className: "filter" }, column, operator);
  column.addEventListener("change", () => change({ column: column.value, operator: "is", value: "" }));
  operator.addEventListener("change", () => change({ ...filter, operator: operator.value }));
  if (filter.operator !== "is missing") {
    const value = make("input", { type: kind === "number" ? "number" : "text", step: "any", value: filter.value ?? "", size: 12, "aria-label": "Value" });
    value.addEventListener("change", () => change({ ...filter, value: kind === "number" && value.value !== "" ? Number(value.value) : value.value }));
    box.append(value);
    if (filter.operator.startsWith("is")) offerChoices(filter, kind, value, change);
  }
  box.append(make("button", { className: "button", type: "button", textContent: "\u00d7", "aria-label": "Remove this filter", onclick: () => change(null) }));
  return box;
}

// A column with few values is chosen from, not typed.
async function offerChoices(filter, kind, input, change) {
  const label = (value) => filter.column === "cause" ? page.causes[page.cause_names[value]] : COMPARED.has(filter.column) ? page.nameOf(value)
    : kind === "boolean" ? (value ? "true" : "false") : kind === "time" ? new Date(value).toISOString().slice(0, 19) : String(value);
  const found = await choices(rows, filter.column).catch(() => null);
  const most = COMPARED.has(filter.column) ? Infinity : kind === "text" ? MAX_TEXTS : MAX_NUMBERS;
  if (!found?.length || !input.isConnected || found.length > most) return;
  const select = make("select", { "aria-label": "Value" }, make("option", { value: "", textContent: "any" }),
    ...found.filter(([value]) => filter.column !== "cause" || value >= 0).map(([value, count]) => make("option", { value: kind === "time" ? new Date(value).toISOString() : kind === "boolean" ? Boolean(value) : value,
      textContent: `${label(value)} (${whole(count)})` })));
  select.value = String(filter.value ?? "");
  select.addEventListener("change", () => change({ ...filter, value: kind === "number" && select.value !== "" ? Number(select.value) : select.value }));
  input.replaceWith(select);
}

async function rowsTab(main, mine) {
  if (!page.table.records) return void main.append(empty("No image of this dataset was explained."));
  if (!rows.isOpen) return void main.append(folderCard());
  const filters = make("div", { id: "filters" });
  const apply = (index, changed) => {
    const next = state.filters.slice();
    if (changed === null) next.splice(index, 1);
    else next[index] = changed;
    go("rows", { filters: next, sort: state.sort });
  };
  filters.append(...state.filters.filter(({ column }) => page.columns.some(({ name }) => name === column)).map((filter, index) => filterRow(filter, (changed) => apply(index, changed))),
    make("button", { className: "button", type: "button", textContent: "+ Filter", onclick: () => apply(state.filters.length, { column: page.columns.find(({ name }) => name === "class_id") ? "class_id" : page.columns[0].name, operator: "is", value: "" }) }));
  const sort = make("select", { className: "field", "aria-label": "Sort by" }, make("option", { value: "", textContent: "order of the dataset" }),
    ...page.columns.filter(({ name }) => name !== "file").map(({ name }) => make("option", { value: name, textContent: `by ${columnLabel(name)}`, selected: name === state.sort.column })));
  const turned = make("button", { className: "button", type: "button", textContent: state.sort.isDown ? "\u2193 highest first" : "\u2191 lowest first",
    hidden: !state.sort.column, onclick: () => go("rows", { filters: state.filters, sort: { ...state.sort, isDown: !state.sort.isDown } }) });
  sort.addEventListener("change", () => go("rows", { filters: state.filters, sort: { ...state.sort, column: sort.value } }));
  const count = make("span", { id: "found", className: "quiet", textContent: "Reading\u2026", role: "status" });
  const tiles = make("div", { className: "tiles large" }), more = make("button", { className: "button", type: "button", textContent: "Show more", hidden: true });
  main.append(filters, make("div", { className: "controls" }, sort, turned, count), tiles, make("p", { className: "controls" }, more));
  const places = await select(rows, state.filters, state.sort);
  if (mine !== turn) return;
  count.textContent = `${whole(places.length)} of ${counted(rows.count, "heatmap")}`;
  if (!places.length) tiles.replaceWith(empty("No row meets these filters."));
  const list = placesList(places);
  let at = 0;
  const add = async () => {
    more.hidden = true;
    const end = Math.min(at + TILES, places.length), first = at;
    at = end;
    const seen = await Promise.all(Array.from({ length: end - first }, (_, offset) => list.at(first + offset)));
    if (mine !== turn) return;
    seen.forEach(({ own }, offset) => tiles.append(pictures.tile(own, notes, () => look.open(list, first + offset))));
    more.hidden = at >= places.length;
  };
  const adding = () => add().catch(complain);
  more.addEventListener("click", adding);
  new IntersectionObserver((entries) => { if (!more.hidden && entries.some(({ isIntersecting }) => isIntersecting)) adding(); }, { rootMargin: "600px" }).observe(more);
  await add();
}

// ---------------------------------------------------------------- notes

function notesTab(main) {
  if (!notes.count) {
    main.append(empty("Open an image and give a verdict or a note. They are kept in this browser, and can be saved as CSV from here."));
    return;
  }
  const kept = Object.values(notes.kept).sort((a, b) => a.row - b.row);
  const list = { length: kept.length, at: async (index) => {
    const { row, index: place } = kept[index], known = embedded.get(`${row}:${place}`);
    if (known) return seenFully(known);
    const file = page.files.findIndex(({ first, last }) => first !== null && first <= row && row <= last);
    return rows.record(file, row, place);
  } };
  main.append(make("div", { className: "controls" }, make("button", { id: "export", className: "button strong", type: "button", textContent: `Save ${counted(kept.length, "note")} as CSV`, onclick: exportNotes }),
    make("span", { className: "quiet", textContent: "They are kept in this browser only." })),
    make("div", { className: "card" }, make("table", { className: "notes" }, make("thead", {}, make("tr", {}, ...["Row", "Class", "Verdict", "Note", ""].map((text) => make("th", { textContent: text })))),
      make("tbody", {}, ...kept.map((one, index) => make("tr", {}, make("td", { textContent: `${one.row}${one.id ? ` \u00b7 ${one.id}` : ""}` }), make("td", { textContent: readable(one.class_name) }),
        make("td", { textContent: VERDICTS[one.verdict] || "" }), make("td", { textContent: one.note || "" }), make("td", {}, make("button", { className: "button", type: "button", textContent: "Look", onclick: () => look.open(list, index) }))))))));
}

function exportNotes() {
  const url = URL.createObjectURL(new Blob(["\ufeff", notes.csv], { type: "text/csv" }));
  const link = make("a", { href: url, download: "audit-notes.csv" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// ---------------------------------------------------------------- the frame

const START = { filters: [is("rank", 1)] };  // of the rows: each image once, with its prediction

const TABS = {
  gallery: ["Gallery", galleryTab, () => report.classes.length],
  confusions: ["Confusions", confusionsTab, () => report.confusions.length],
  shortcuts: ["Shortcuts", shortcutsTab, () => report.shortcuts.length],
  map: ["Map", mapTab, () => null],
  rows: ["Rows", rowsTab, () => page.table.records],
  notes: ["Notes", notesTab, () => notes.count || null],
};

function tell() {
  const { dataset } = report, total = {};
  for (const one of report.classes) for (const [cause, count] of Object.entries(one.causes)) total[cause] = (total[cause] || 0) + count;
  const judged = Object.values(total).reduce((sum, count) => sum + count, 0);
  document.title = find("title").textContent = page.title;
  find("title").append(make("small", { textContent: dataset.uri }));
  const figures = [[whole(dataset.explained), "images"], [whole(report.classes.length), report.classes.length === 1 ? "class" : "classes"]];
  if (dataset.accuracy !== null) figures.push([percent(dataset.accuracy), "accuracy"]);
  if (report.shortcuts.length) figures.push([whole(report.shortcuts.length), report.shortcuts.length === 1 ? "shortcut" : "shortcuts"]);
  if (dataset.failed) figures.push([whole(dataset.failed), "failed"]);
  find("figures").append(...figures.map(([value, label]) => make("div", { className: "figure" }, make("b", { textContent: value }), make("span", { textContent: label }))));
  if (judged) find("causes").append(bars(total), causeLegend(total, judged));
  find("advice").append(...page.advice.map((text) => make("li", { textContent: text })));
  find("advice").hidden = !page.advice.length;
  for (const [label, value] of page.facts) find("facts").append(make("div", {}, make("dt", { textContent: label }), make("dd", { textContent: value })));
}

function writeTabs() {
  find("tabs").replaceChildren(...Object.entries(TABS).map(([name, [label, , count]]) => make("button", { type: "button", id: `tab-${name}`, role: "tab", "aria-selected": String(state.tab === name),
    "aria-controls": "main", tabIndex: state.tab === name ? 0 : -1, onclick: () => go(name, START) }, label, count() === null ? null : make("span", { className: "count", textContent: whole(count()) }))));
}

function moveInTabs(event) {
  const names = Object.keys(TABS), at = names.indexOf(state.tab);
  const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: names.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  const name = names[(next + names.length) % names.length];
  go(name, START);
  find(`tab-${name}`).focus();
}

// A tab with its filters is an address, so that the browser's way back works, and a link can be kept.
function go(tab, { filters = [], sort = { column: "", isDown: true } }) {
  const wish = tab === "rows" ? `rows?${encodeURIComponent(JSON.stringify({ filters, sort }))}` : tab;
  if (location.hash === `#${wish}`) show();
  else location.hash = wish;
}

function show() {
  const [tab, wish] = location.hash.slice(1).split("?");
  state.tab = Object.hasOwn(TABS, tab) ? tab : "gallery";
  state.filters = START.filters;
  state.sort = { column: "", isDown: true };
  try {
    if (wish) {
      const { filters, sort } = JSON.parse(decodeURIComponent(wish));
      state.filters = filters.filter((one) => page.columns.some(({ name }) => name === one.column));
      state.sort = { column: page.columns.some(({ name }) => name === sort.column) ? sort.column : "", isDown: Boolean(sort.isDown) };
    }
  } catch { /* an address that somebody has changed: all rows */ }
  const main = find("main"), mine = ++turn;
  writeTabs();
  main.replaceChildren();
  main.setAttribute("aria-labelledby", `tab-${state.tab}`);
  Promise.resolve(TABS[state.tab][1](main, mine)).then(() => requestAnimationFrame(() => setTimeout(() => performance.mark(`audit ${state.tab}`))),
    (error) => { if (mine === turn) complain(error); });
  pictures.tidy();
  const top = main.offsetTop - find("bar").offsetHeight;
  if (scrollY > top) scrollTo({ top });  // the tabs stay where they are
}

find("folder").addEventListener("change", () => {
  const files = [...find("folder").files];
  find("folder").value = "";  // so that the same folder can be chosen again
  if (!files.length) return;
  try {
    rows.choose(files);
    show();
  } catch (error) {
    complain(error);
  }
});
find("tabs").addEventListener("keydown", moveInTabs);
notes.addEventListener("change", () => {
  writeTabs();
  for (const mark of document.querySelectorAll(".verdict-mark")) markNote(mark, notes);
});
addEventListener("hashchange", show);
tell();
show();

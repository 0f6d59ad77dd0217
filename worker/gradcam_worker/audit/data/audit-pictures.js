// Pictures: tiles of heatmaps over their photos, and the dialog in which one is looked at.

const { colormaps, decodeCells, DEFAULT_OPACITY, enlarge, paint, tableOf } = customElements.get("gradcam-viewer");
const PATIENCE_MS = 3000;  // to wait for a whole photo, where there is a small one
const TILE_PX = 256;  // the longer side of a tile's canvas
const ONE = 65_535;  // how 1 is encoded in the maps of the viewer
const find = (id) => document.getElementById(id);

// Everything that is data becomes text here, never markup.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const whole = (count) => Number(count).toLocaleString("en");
const percent = (share) => share === null || share === undefined || Number.isNaN(share) ? "\u2013"
  : share > 0 && share < 0.0005 ? "<0.1 %" : `${(100 * share).toFixed(1)} %`;
const readable = (name) => String(name ?? "").replaceAll("_", " ");
const counted = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;
const keyOf = (record) => `${record.row}:${record.index}`;

// ---------------------------------------------------------------- what was written about a record

const VERDICTS = { right: "Looks at the right thing", wrong: "Looks at the wrong thing", label: "The label is wrong", unsure: "Not sure" };

class Notes extends EventTarget {
  constructor(name) {
    super();
    this.name = name;
    this.kept = {};
    try {
      this.kept = JSON.parse(localStorage.getItem(name)) || {};
    } catch { /* a browser that keeps nothing, or something else's entry: notes last as long as the page */ }
  }

  of(key) { return this.kept[key] || {}; }
  get count() { return Object.keys(this.kept).length; }

  set(record, change) {
    const key = keyOf(record), known = { ...this.of(key), ...change };
    if (known.verdict || known.note) {
      this.kept[key] = { row: record.row, index: record.index, id: record.id, uri: record.uri, class_id: record.class_id,
        class_name: record.class_name, ...known };
    } else delete this.kept[key];
    try {
      localStorage.setItem(this.name, JSON.stringify(this.kept));
    } catch { /* see above */ }
    this.dispatchEvent(new Event("change"));
  }

  // As CSV; a text that a spreadsheet would take for a formula gets an apostrophe, as spreadsheets write it.
  get csv() {
    const columns = ["row", "index", "id", "uri", "class_id", "class_name", "verdict", "note"];
    const cell = (value) => {
      const text = String(value ?? "").replace(/^(?=[=+\-@\t\r])/, typeof value === "number" ? "" : "'");
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = Object.values(this.kept).sort((a, b) => a.row - b.row || a.index - b.index)
      .map((one) => columns.map((name) => cell(one[name])).join(","));
    return `${[columns.join(","), ...lines].join("\r\n")}\r\n`;
  }
}

// ---------------------------------------------------------------- records, as the dataset's files and the page hold them

function cellsOf(record, page) {
  if (record.cells) return record;
  const { rows, columns, grid } = page.maps;
  return Object.assign(record, { cells: decodeCells(record.heatmap), rows, columns, grid });
}

// Where the whole photo of a record can be loaded from; null: nowhere.
function addressOf({ uri, link }, page) {
  if (link) return link;
  for (const [prefix, url] of page.image_urls) {
    if (uri?.startsWith(prefix)) return url + uri.slice(prefix.length).split("/").map(encodeURIComponent).join("/");
  }
  return /^https?:/.test(uri || "") || (uri?.startsWith("file:") && location.protocol === "file:") ? uri : null;
}

const embeddedPhoto = (record, page) => {
  const jpeg = page.photos[record.photo]?.jpeg;
  return jpeg ? `data:image/jpeg;base64,${jpeg}` : null;
};

// The photo in the best size that can be had.
async function bestPhoto(record, page) {
  const url = addressOf(record, page), small = embeddedPhoto(record, page);
  if (!url || !small) return url || small;
  const image = make("img", { src: url });
  const isThere = await Promise.race([image.decode().then(() => true, () => false), new Promise((resolve) => { setTimeout(resolve, PATIENCE_MS, false); })]);
  return isThere ? url : small;
}

function placementOf({ shown_xyxy: shown, width, height }) {
  return shown ? [shown[0] / width, shown[1] / height, shown[2] / width, shown[3] / height] : [0, 0, 1, 1];
}

const boxesOf = ({ truth_boxes: boxes, width, height }) => (boxes || []).map(([left, top, right, bottom]) =>
  [left / width, top / height, right / width, bottom / height]);

function encodeCells(cells) {
  const data = new DataView(new ArrayBuffer(2 * cells.length));
  cells.forEach((value, at) => data.setUint16(2 * at, Math.round(Math.min(Math.max(value, 0), 1) * ONE), true));
  let text = "";
  for (const byte of new Uint8Array(data.buffer)) text += String.fromCharCode(byte);
  return btoa(text);
}

// What the viewer takes: all explained classes of one image.
function viewerDocument({ beside }, page, photo) {
  const ordered = beside.map((one) => cellsOf(one, page)).sort((a, b) => a.rank - b.rank);
  const [first] = ordered;
  return { photo, placement: placementOf(first), boxes: boxesOf(first),
    maps: { rows: first.rows, columns: first.columns, grid: first.grid, uint16: ordered.map(({ cells }) => encodeCells(cells)) },
    manifest: { method: page.report.dataset.method, input: { width: first.width, height: first.height },
      explanations: ordered.map((one) => ({ class: { id: one.class_id, wnid: one.wnid, name: one.class_name }, rank: one.rank,
        probability: one.probability, raw_min: one.raw_min, raw_max: one.raw_max, metrics: metricsOf(one) })) } };
}

const metricsOf = (record) => Object.fromEntries(["deletion", "insertion", "confidence_drop", "confidence_increase"]
  .filter((name) => typeof record[name] === "number").map((name) => [name, record[name]]));

// ---------------------------------------------------------------- tiles

class Pictures {
  #drawn = new Map();  // canvas -> its levels
  #waiting = new Map();  // canvas -> the function that draws it

  constructor(page) {
    this.page = page;
    this.sight = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) if (isIntersecting) this.draw(target);
    }, { rootMargin: "500px" });
    for (const name of colormaps) find("colormap").append(make("option", { value: name, textContent: name }));
    find("opacity").value = DEFAULT_OPACITY;
    find("opacity").addEventListener("input", () => this.#fade());
    for (const id of ["threshold", "colormap"]) find(id).addEventListener("input", () => this.#recolor());
    find("look-of-heat").addEventListener("submit", (event) => event.preventDefault());
    addEventListener("beforeprint", () => [...this.#waiting.keys()].forEach((canvas) => this.draw(canvas)));
    this.#fade();
    this.#recolor();
  }

  draw(canvas) {
    const levels = this.#waiting.get(canvas);
    if (!levels) return;
    this.#waiting.delete(canvas);
    this.sight.unobserve(canvas);
    this.#drawn.set(canvas, levels());
    this.#paint(canvas);
  }

  // Forget what is no longer on the page.
  tidy() {
    for (const canvas of [...this.#drawn.keys(), ...this.#waiting.keys()]) {
      if (canvas.isConnected) continue;
      this.#drawn.delete(canvas);
      this.#waiting.delete(canvas);
      this.sight.unobserve(canvas);
    }
  }

  #paint(canvas) {
    paint(this.#drawn.get(canvas), tableOf(find("colormap").value), find("threshold").value / 100 * 255, canvas);
  }

  #recolor() {
    const threshold = Number(find("threshold").value);
    find("threshold-value").textContent = threshold ? `${threshold} %` : "nothing";
    for (const canvas of this.#drawn.keys()) this.#paint(canvas);
  }

  #fade() {
    find("opacity-value").textContent = `${find("opacity").value} %`;
    document.documentElement.style.setProperty("--opacity", find("opacity").value / 100);
  }

  // A stage of this shape with a heatmap, over a photo where there is one.
  stage(width, height, levels, photo, boxes = []) {
    const scale = TILE_PX / Math.max(width, height);
    const canvas = make("canvas", { width: Math.max(Math.round(width * scale), 1), height: Math.max(Math.round(height * scale), 1), "aria-hidden": "true" });
    const stage = make("span", { className: "stage" });
    stage.style.aspectRatio = `${width} / ${height}`;
    stage.style.width = `${100 * Math.min(1, width / height)}%`;
    if (photo) stage.append(make("img", { alt: "", decoding: "async", loading: "lazy", src: photo, onerror: ({ target }) => target.remove() }));
    stage.append(canvas);
    if (boxes.length) stage.append(outline(boxes));
    this.#waiting.set(canvas, () => levels(canvas.width, canvas.height));
    this.sight.observe(canvas);
    return stage;
  }

  tile(record, notes, look) {
    cellsOf(record, this.page);
    const levels = (width, height) => enlarge(record.cells, record.rows, record.columns, width, height, placementOf(record));
    const seen = this.page.photos[record.photo];
    const photo = embeddedPhoto(record, this.page) || addressOf(record, this.page);
    const name = readable(record.class_name);
    const tile = make("button", { className: "tile", type: "button", "aria-label": `Look at row ${record.row}, ${name}`, onclick: look },
      this.stage(record.width || 1, record.height || 1, levels, photo, boxesOf(record)));
    const cause = this.page.causeOf(record);
    if (cause) tile.append(make("span", { className: "cause-mark", "--color": `var(--${cause})` }));
    const mark = make("span", { className: "verdict-mark", hidden: true });
    mark.dataset.key = keyOf(record);
    markNote(mark, notes);
    tile.append(mark);
    const truth = record.truth_ids?.length ? record.truth_ids : typeof record.truth === "number" ? [record.truth] : [];
    const isWrong = truth.length && !truth.includes(record.class_id);
    const caption = make("figcaption", {}, make("b", { textContent: percent(record.probability) }),
      make("span", { textContent: `${name}${record.rank > 1 ? `, rank ${record.rank}` : ""}`, title: name }));
    if (isWrong) caption.append(make("span", { textContent: `is ${truth.map((id) => this.page.nameOf(id)).join(", ")}` }));
    caption.append(make("span", { className: "id", textContent: record.id || record.uri.split("/").at(-1) || `row ${record.row}`, title: `row ${record.row}: ${record.uri}` }));
    if (seen?.code && !photo) caption.append(make("span", { className: "chip", textContent: seen.code, title: seen.detail }));
    return make("figure", {}, tile, caption);
  }

  // A heatmap that belongs to no photo: the mean of a class.
  plain({ rows, columns, cells }, label, look) {
    const levels = (width, height) => enlarge(cells, rows, columns, width, height);
    return make(look ? "button" : "div", { className: "tile", type: look ? "button" : undefined, "aria-label": label, onclick: look },
      this.stage(columns, rows, levels, null));
  }
}

function markNote(mark, notes) {
  const { verdict, note } = notes.of(mark.dataset.key);
  mark.hidden = !(verdict || note);
  mark.textContent = verdict || "note";
}

function outline(boxes) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" })) svg.setAttribute(name, value);
  for (const [left, top, right, bottom] of boxes) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) rect.setAttribute(name, value);
    svg.append(rect);
  }
  return svg;
}

// ---------------------------------------------------------------- one image at a time

class Look {
  #list = null;
  #at = 0;
  #shown = null;

  constructor(page, notes, fail) {
    this.page = page;
    this.notes = notes;
    this.fail = fail;
    Object.entries(VERDICTS).forEach(([value, text], at) => find("verdicts").append(make("label", { className: "choice" },
      make("input", { type: "radio", name: "verdict", value, onclick: () => this.#judge(value) }), text, make("kbd", { textContent: at + 1 }))));
    find("note").addEventListener("input", () => this.notes.set(this.#shown, { note: find("note").value }));
    find("previous").addEventListener("click", () => this.step(-1));
    find("next").addEventListener("click", () => this.step(1));
    find("close").addEventListener("click", () => find("look").close());
    find("look").addEventListener("click", (event) => { if (event.target === find("look")) find("look").close(); });
    find("look").addEventListener("keydown", (event) => this.#press(event));
    find("verdict").addEventListener("submit", (event) => event.preventDefault());
  }

  // `list`: { length, at(index) -> promise of { own, beside } }.
  async open(list, at) {
    this.#list = list;
    await this.#show(at);
  }

  step(by) {
    const next = this.#at + by;
    return next >= 0 && next < this.#list.length ? this.#show(next) : undefined;
  }

  async #show(at) {
    const list = this.#list;
    this.#at = at;
    let seen, photo;
    try {
      seen = await list.at(at);
      photo = await bestPhoto(seen.own, this.page);
    } catch (error) {
      find("look").close();
      this.fail(error);
      return;
    }
    if (list !== this.#list || at !== this.#at) return;  // another was asked for meanwhile
    const { own } = seen, viewer = find("viewer"), document = viewerDocument(seen, this.page, photo);
    this.#shown = own;
    find("look-title").textContent = `Row ${own.row}${own.id ? ` \u00b7 ${own.id}` : ""}`;
    find("look-title").title = own.uri || "";
    find("look-place").textContent = `${whole(at + 1)} of ${whole(list.length)}`;
    find("previous").disabled = at === 0;
    find("next").disabled = at === list.length - 1;
    if (!find("look").open) {
      viewer.setAttribute("colormap", find("colormap").value);
      viewer.setAttribute("opacity", find("opacity").value);
      find("look").showModal();
      find(at === list.length - 1 ? "close" : "next").focus();
    }
    const index = document.manifest.explanations.findIndex((one) => one.class.id === own.class_id);
    viewer.addEventListener("gradcam-load", () => { viewer.selected = index; }, { once: true });
    viewer.data = document;
    const { verdict, note } = this.notes.of(keyOf(own));
    for (const input of find("verdicts").querySelectorAll("input")) input.checked = input.value === verdict;
    find("note").value = note || "";
    find("look-facts").replaceChildren(...factsOf(own, this.page).map(([name, value]) => make("tr", {}, make("th", { textContent: name }), make("td", {}, value))));
    if (at + 1 < list.length) list.at(at + 1).catch(() => undefined);  // is said when it is asked for
  }

  #judge(value) {
    const known = this.notes.of(keyOf(this.#shown)).verdict;
    const verdict = known === value ? undefined : value;  // the same again takes it back
    this.notes.set(this.#shown, { verdict });
    for (const input of find("verdicts").querySelectorAll("input")) input.checked = input.value === verdict;
  }

  #press(event) {
    const from = event.composedPath()[0];
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || from.matches?.("textarea, select, input[type=range]")) return;
    const verdict = Object.keys(VERDICTS)[Number(event.key) - 1];
    const isInViewer = from !== find("viewer") && event.composedPath().includes(find("viewer"));
    if (verdict) this.#judge(verdict);
    else if (event.key === "n") find("note").focus();
    else if (event.key === "j" || (event.key === "ArrowRight" && !isInViewer)) this.step(1);
    else if (event.key === "k" || (event.key === "ArrowLeft" && !isInViewer)) this.step(-1);
    else return;
    event.preventDefault();
  }
}

const HIDDEN_FACTS = new Set(["cells", "rows", "columns", "grid", "heatmap", "photo", "sha256", "wnid", "class_name", "raw_min", "raw_max", "peak_xy",
  "box_xyxy", "shown_xyxy", "truth_boxes", "truth_ids", "truth", "row", "id", "uri", "overlay", "error", "error_detail", "index", "file",
  "class_id", "width", "height", "cause", "probability", "link"]);

function factsOf(record, page) {
  const truth = record.truth_ids?.length ? record.truth_ids : typeof record.truth === "number" ? [record.truth] : [];
  const cause = page.causeOf(record);
  const link = /^https?:/.test(record.uri || "") ? make("a", { href: record.uri, target: "_blank", rel: "noopener noreferrer", textContent: record.uri }) : record.uri;
  const facts = [[record.rank === 1 ? "predicted" : "class", `${record.class_id} ${readable(record.class_name)}`], ["probability", percent(record.probability)],
    ["truth", truth.map((id) => page.nameOf(id)).join(", ") || null], ["cause", cause ? page.causes[cause] : null], ["image", link], ["size", record.width ? `${record.width} \u00d7 ${record.height}` : null]];
  for (const [name, value] of Object.entries(record)) {
    if (HIDDEN_FACTS.has(name) || value === null || value === undefined) continue;
    facts.push([readable(name), typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(4)).toString()
      : typeof value === "object" ? JSON.stringify(value) : String(value)]);
  }
  return facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
}

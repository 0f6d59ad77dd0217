// The records of an audit: the narrow table beside the page, and single records of the dataset's own files. Both
// are Parquet; only the parts that are asked for are read, by range requests, or from a folder that the reader chose.

const WHOLE_BYTES = 2_000_000;  // a file of at most this size is read in one request
const TAIL_BYTES = 65_536;  // the end of a file, in which its description is
const KEPT_GROUPS = 48;  // groups of records of the dataset's files, in memory
const NOT_READ = new Set(["heat_features", "truth_mask", "row_digest"]);  // large, and not shown

const MAX_CHOICES = 2000;  // values of a column that are offered

class NotReadable extends Error {}

// A file of the web, as hyparquet reads it.
class WebFile {
  constructor(url, bytes) {
    this.url = url;
    this.byteLength = bytes;
  }

  async open() {
    if (this.byteLength === undefined || this.byteLength <= WHOLE_BYTES) {
      this.whole = await (await this.#ask({})).arrayBuffer();
      this.byteLength = this.whole.byteLength;
    }
    return this;
  }

  async slice(start, end = this.byteLength) {
    if (this.whole) return this.whole.slice(start, end);
    const answer = await this.#ask({ Range: `bytes=${start}-${end - 1}` });
    const data = await answer.arrayBuffer();
    if (answer.status === 206) return data;
    this.whole = data;  // a server that knows no ranges
    return data.slice(start, end);
  }

  async #ask(headers) {
    let answer;
    try {
      answer = await fetch(this.url, { headers });
    } catch {
      throw new NotReadable("The rows cannot be read: their server does not answer, or does not allow this page to read it (CORS).");
    }
    if (answer.ok) return answer;
    const why = { 403: "the links of this page have expired, or were never valid", 404: "the file is not beside this page" };
    throw new NotReadable(`The rows cannot be read: ${why[answer.status] || "the server refuses"} (HTTP ${answer.status}).`);
  }
}

// A file of a folder that the reader chose.
class ChosenFile {
  constructor(file) {
    this.file = file;
    this.byteLength = file.size;
  }

  open() { return this; }
  slice(start, end = this.byteLength) { return this.file.slice(start, end).arrayBuffer(); }
}

class Rows {
  #opened = new Map();  // address -> promise of { file, metadata }
  #columns = new Map();  // name -> promise of its values
  #groups = new Map();  // address and group -> promise of its records
  #chosen = null;  // paths of a chosen folder -> its files

  constructor(page) {
    this.page = page;
    this.choices = new Map();  // column -> promise of its values and how often each comes
    this.count = page.table.records;
    this.isLocal = location.protocol === "file:";
  }

  // Whether rows can be read, or a folder has to be chosen first: pages from a disk may not read files beside them.
  get isOpen() { return !this.isLocal || this.#chosen !== null; }

  choose(files) {
    const found = new Map();
    for (const file of files) {
      const parts = file.webkitRelativePath.split("/");
      for (let at = 0; at < parts.length; at++) {
        const path = parts.slice(at).join("/");
        if (!found.has(path)) found.set(path, []);
        found.get(path).push(file);
      }
    }
    if (!found.has("rows.parquet") && this.count) throw new NotReadable("That folder holds no rows.parquet: choose the dataset's folder, in which the audit is.");
    this.#chosen = found;
    this.#opened.clear();
    this.#columns.clear();
    this.#groups.clear();
    this.choices.clear();
    this.linked = undefined;
  }

  #open(name, url, bytes) {
    if (!this.#opened.has(name)) this.#opened.set(name, this.#openNow(name, url, bytes));
    this.#opened.get(name).catch(() => this.#opened.delete(name));
    return this.#opened.get(name);
  }

  async #openNow(name, url, bytes) {
    const chosen = this.#chosen?.get(name), address = new URL(url, document.baseURI);
    let file;
    if (chosen) {
      const own = chosen.find(({ size }) => size === bytes);
      if (!own) throw new NotReadable(`${name} of the chosen folder is not that of this page: the dataset has changed since, or it is of another audit.`);
      file = new ChosenFile(own);
    } else if (address.protocol === "file:") {
      throw new NotReadable(this.#chosen ? `The chosen folder holds no ${name}.` : "A page from a disk may not read the files beside it: choose the dataset's folder.");
    } else file = await new WebFile(address, bytes).open();
    const metadata = await hyparquet.parquetMetadataAsync(file, { initialFetchSize: TAIL_BYTES });
    return { file, metadata };
  }

  // All values of a column: numbers as Float64Array (NaN: none), booleans as Int8Array (-1: none), times as
  // milliseconds, texts as a list.
  column(name) {
    if (!this.#columns.has(name)) this.#columns.set(name, this.#read(name));
    this.#columns.get(name).catch(() => this.#columns.delete(name));
    return this.#columns.get(name);
  }

  async #read(name) {
    const column = this.page.columns.find((one) => one.name === name);
    if (!column) throw new NotReadable(`There is no column ${name}.`);
    const { url, bytes } = this.page.table.files[column.file];
    const { file, metadata } = await this.#open(column.file, url, bytes);
    const isText = column.kind === "text", isFlag = column.kind === "boolean";
    const values = isText ? new Array(this.count).fill(null) : isFlag ? new Int8Array(this.count).fill(-1)
      : new Float64Array(this.count).fill(NaN);
    await hyparquet.parquetRead({ file, metadata, columns: [name], compressors: hyparquet.compressors,
      onChunk: ({ columnData, rowStart }) => {
        for (let at = 0; at < columnData.length; at++) {
          const value = columnData[at];
          if (value === null || value === undefined) continue;
          values[rowStart + at] = isText ? value : Number(value);
        }
      } });
    return values;
  }

  // The link to the image of a record; null: it has none.
  async link(place) {
    const described = this.page.table.files["image-links.parquet"];
    if (!described) return null;
    const { file, metadata } = await this.#open("image-links.parquet", described.url, described.bytes);
    this.linked ??= this.#readLinks(file, metadata, "place", 0, undefined);
    const linked = await this.linked;
    let low = 0, high = linked.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (linked[middle] < place) low = middle + 1;
      else high = middle;
    }
    if (linked[low] !== place) return null;
    let first = 0;
    for (const group of metadata.row_groups) {
      const end = first + Number(group.num_rows);
      if (low < end) return (await this.#linksOf(file, metadata, first, end))[low - first];
      first = end;
    }
    return null;
  }

  #linksOf(file, metadata, first, end) {
    const key = `links ${first}`;
    if (!this.#groups.has(key)) this.#groups.set(key, this.#readLinks(file, metadata, "url", first, end));
    return this.#groups.get(key);
  }

  async #readLinks(file, metadata, name, rowStart, rowEnd) {
    const values = [];
    await hyparquet.parquetRead({ file, metadata, columns: [name], rowStart, rowEnd, compressors: hyparquet.compressors,
      onComplete: (read) => { for (const [value] of read) values.push(value); } });
    return values;
  }

  // Records of the dataset's files, with their heatmaps, by their places in the table; beside each, all records of
  // its image.
  async records(places) {
    const [files, rows, indices] = await Promise.all(["file", "row", "index"].map((name) => this.column(name)));
    return Promise.all(places.map((place) => this.record(files[place], rows[place], indices[place])));
  }

  async record(fileIndex, row, index) {
    const { name, bytes, url } = this.page.files[fileIndex];
    const { file, metadata } = await this.#open(name, url, bytes);
    for (const group of groupsOf(metadata, row)) {
      const found = (await this.#group(name, file, metadata, group)).get(row);
      if (found) return { own: found.find((one) => one.index === index) || found[0], beside: found };
    }
    throw new NotReadable(`Row ${row} is no longer in ${name}: the dataset has changed since the audit.`);
  }

  #group(name, file, metadata, group) {
    const key = `${name} ${group.first}`;
    if (!this.#groups.has(key)) {
      this.#groups.set(key, this.#readGroup(file, metadata, group));
      this.#groups.get(key).catch(() => this.#groups.delete(key));
      if (this.#groups.size > KEPT_GROUPS) this.#groups.delete(this.#groups.keys().next().value);
    }
    return this.#groups.get(key);
  }

  async #readGroup(file, metadata, { first, end }) {
    const columns = hyparquet.parquetSchema(metadata).children.map((one) => one.element.name)
      .filter((one) => !NOT_READ.has(one));
    const described = metadata.key_value_metadata?.find(({ key }) => key === "gradcam");
    const [rows, cellColumns] = JSON.parse(described.value).grid;
    const byRow = new Map();
    await hyparquet.parquetRead({ file, metadata, columns, rowStart: first, rowEnd: end, rowFormat: "object",
      compressors: hyparquet.compressors, onComplete: (records) => {
        for (const record of records) {
          if (record.error) continue;
          const plain = plainly(record);
          Object.assign(plain, { cells: Float32Array.from(record.heatmap, (value) => Number.isFinite(value) ? value : 0),
            rows, columns: cellColumns, grid: [rows, cellColumns] });
          delete plain.heatmap;
          if (!byRow.has(plain.row)) byRow.set(plain.row, []);
          byRow.get(plain.row).push(plain);
        }
      } });
    return byRow;
  }
}

// The groups of records of a file in which a row may be.
function* groupsOf(metadata, row) {
  const place = metadata.row_groups[0].columns.findIndex((one) => one.meta_data.path_in_schema[0] === "row");
  let first = 0;
  for (const group of metadata.row_groups) {
    const end = first + Number(group.num_rows);
    const { min_value: least, max_value: most } = group.columns[place].meta_data.statistics || {};
    if (least === undefined || (Number(least) <= row && row <= Number(most))) yield { first, end };
    first = end;
  }
}

// A value without numbers and dates that JSON does not know; a number that is too large for JavaScript is a text.
function plainly(value) {
  if (typeof value === "bigint") return Number.isSafeInteger(Number(value)) ? Number(value) : String(value);
  if (value instanceof Date) return value.toISOString();
  if (Array.isArray(value)) return value.map(plainly);
  if (value?.constructor !== Object) return value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, plainly(one)]));
}

// ---------------------------------------------------------------- what is filtered, and in which order

const OPERATORS = {
  number: { "is": (a, b) => a === b, "is not": (a, b) => a !== b, "at least": (a, b) => a >= b, "at most": (a, b) => a <= b,
    "is missing": (a) => Number.isNaN(a) },
  text: { "is": (a, b) => a === b, "is not": (a, b) => a !== b, "contains": (a, b) => a !== null && a.toLowerCase().includes(b.toLowerCase()),
    "is missing": (a) => a === null },
  boolean: { "is": (a, b) => a === b, "is missing": (a) => a === -1 },
};
OPERATORS.time = { "is": OPERATORS.number.is, "at least": OPERATORS.number["at least"], "at most": OPERATORS.number["at most"],
  "is missing": OPERATORS.number["is missing"] };

// What was typed, as values of the column are; undefined: nothing that could be compared.
function wanted(kind, text) {
  if (kind === "text") return text;
  if (kind === "boolean") return { true: 1, yes: 1, 1: 1, false: 0, no: 0, 0: 0 }[String(text).toLowerCase()];
  const value = kind === "time" ? Date.parse(text) : Number(text);
  return text === "" || Number.isNaN(value) ? undefined : value;
}

// The places of the records that meet all filters [{ column, operator, value }], sorted by a column, those without
// a value at the end.
async function select(rows, filters, sort) {
  const kinds = Object.fromEntries(rows.page.columns.map(({ name, kind }) => [name, kind]));
  const passed = new Uint8Array(rows.count).fill(1);
  for (const { column, operator, value } of filters) {
    const compare = OPERATORS[kinds[column]]?.[operator];
    const other = operator === "is missing" ? null : wanted(kinds[column], value);
    if (!compare || other === undefined) continue;
    const values = await rows.column(column);
    for (let place = 0; place < passed.length; place++) {
      if (passed[place] && !compare(values[place], other)) passed[place] = 0;
    }
  }
  let count = 0;
  for (const one of passed) count += one;
  const places = new Uint32Array(count);
  for (let place = 0, at = 0; place < passed.length; place++) if (passed[place]) places[at++] = place;
  if (!sort?.column) return places;
  const values = await rows.column(sort.column), sign = sort.isDown ? -1 : 1;
  if (kinds[sort.column] === "text") {
    return places.sort((a, b) => values[a] === values[b] ? a - b : values[a] === null ? 1 : values[b] === null ? -1
      : values[a] < values[b] ? -sign : sign);
  }
  const isNone = kinds[sort.column] === "boolean" ? (value) => value < 0 : Number.isNaN;
  return places.sort((a, b) => {
    const noA = isNone(values[a]), noB = isNone(values[b]);
    return noA || noB ? noA - noB || a - b : sign * (values[a] - values[b]) || a - b;
  });
}

// The values of a column and how often each comes, if they are few; else null.
function choices(rows, name) {
  if (!rows.choices.has(name)) rows.choices.set(name, countValues(rows, name));
  rows.choices.get(name).catch(() => rows.choices.delete(name));
  return rows.choices.get(name);
}

async function countValues(rows, name) {
  const { kind } = rows.page.columns.find((one) => one.name === name);
  const values = await rows.column(name), counts = new Map();
  for (const value of values) {
    if (value === null || Number.isNaN(value) || (kind === "boolean" && value < 0)) continue;
    counts.set(value, (counts.get(value) || 0) + 1);
    if (counts.size > MAX_CHOICES) return null;
  }
  return [...counts].sort(([a], [b]) => a < b ? -1 : 1);
}

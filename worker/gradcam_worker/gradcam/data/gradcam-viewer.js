// The element gradcam-viewer: look at heatmaps over their photo. One file without dependencies, a classic script.
//
//   <gradcam-viewer src="manifest.json"></gradcam-viewer>
//
// `src`, or the property `data`, is the manifest of a job or a viewer document: see docs/how-to/viewer.md.
// All text of the data becomes text nodes, never markup. The style is a constructed sheet, so that a content
// security policy needs neither inline style nor inline script.
(() => {
"use strict";

const DEFAULT_COLORMAP = "viridis";
const DEFAULT_OPACITY = 50;  // percent
const MAX_HEAT_PIXELS = 1_500_000;  // of the layer that is drawn; the browser enlarges it over a larger photo
const MAX_ZOOM = 32;
const SAME_SHAPE = 0.03;  // of the logarithms of two ratios of the sides: a smaller photo is rounded to pixels
const MIN_CELL_PX = 5;  // on the screen; lines closer than this would hide the photo
const ENCODED_ONE = 65_535;  // how 1 is encoded in `maps`
const LOW_PROBABILITY = 0.01;  // a class below it is no answer of the network
const SMOOTHING = 0.005, PERCENTILE = 0.99;  // of Integrated Gradients, as the worker draws them
const COLOR_NOTES = {
  jet: "Jet has bright bands that look like borders in the photo. They are in the colours, not in the values.",
  turbo: "Turbo has several bright bands: similar values may look far apart.",
};

const MEANINGS = {
  deletion: ["Deletion", "area under the class's probability while the hottest pixels are removed: low is faithful"],
  insertion: ["Insertion", "the same area while they are brought back: high is faithful"],
  confidence_drop: ["Confidence drop", "share of the probability lost when only what is hot is left: low is faithful"],
  confidence_increase: ["Confidence increase", "1: with only what is hot the class became more probable; 0: it did not"],
};

// ---------------------------------------------------------------- the data

const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const percent = (share) => share >= 0.0005 ? `${(100 * share).toFixed(1)} %` : "<0.1 %";
const named = (one) => `${one.id} ${String(one.name).replaceAll("_", " ")}`;
const number = (value) => Number(value.toPrecision(3)).toString();

// The file of an array in an .npz: {descr, shape, view}. Files in it are stored, not compressed.
function arrayOf(file, name) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  if (view.getUint32(0, true) !== 0x04034b50) return npy(file);
  let end = file.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("The file of the heatmaps is cut off.");
  let entry = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left; left--) {
    const length = view.getUint16(entry + 28, true);
    const found = new TextDecoder().decode(file.subarray(entry + 46, entry + 46 + length));
    if (found === `${name}.npy`) {
      if (view.getUint16(entry + 10, true)) throw new Error("The heatmaps are compressed: an .npz of a job is not.");
      const start = view.getUint32(entry + 42, true);
      const first = start + 30 + view.getUint16(start + 26, true) + view.getUint16(start + 28, true);
      return npy(file.subarray(first, first + view.getUint32(entry + 24, true)));
    }
    entry += 46 + length + view.getUint16(entry + 30, true) + view.getUint16(entry + 32, true);
  }
  throw new Error(`The file of the heatmaps has no array "${name}".`);
}

function npy(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  if (file[0] !== 0x93 || file[1] !== 0x4e) throw new Error("The heatmaps are neither an .npz nor an .npy file.");
  const long = file[6] > 1;
  const size = long ? view.getUint32(8, true) : view.getUint16(8, true);
  const start = (long ? 12 : 10) + size;
  const header = new TextDecoder("latin1").decode(file.subarray(long ? 12 : 10, start));
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((part) => part.trim()).map(Number);
  if (!header.includes("'<f4'") || shape.length !== 3) throw new Error(`The heatmaps have an unknown form: ${header}`);
  const [count, rows, columns] = shape;
  const cells = rows * columns;
  const maps = Array.from({ length: count }, (_, index) => Float32Array.from({ length: cells }, (_, cell) =>
    view.getFloat32(start + 4 * (index * cells + cell), true)));
  return { rows, columns, maps };
}

// Cells of maps (uint16, the low byte first) -> numbers in [0, 1].
function decodeCells(text) {
  const numbers = new DataView(bytes(text).buffer);
  return Float32Array.from({ length: numbers.byteLength / 2 }, (_, cell) =>
    numbers.getUint16(2 * cell, true) / ENCODED_ONE);
}

// `uint16`: all maps in one text, or a list of one text each.
function decodeMaps({ rows, columns, uint16 }) {
  if (Array.isArray(uint16)) return { rows, columns, maps: uint16.map(decodeCells) };
  const cells = decodeCells(uint16), maps = [];
  for (let start = 0; start < cells.length; start += rows * columns) {
    maps.push(cells.subarray(start, start + rows * columns));
  }
  return { rows, columns, maps };
}

// Integrated Gradients: a few single pixels are far above all others, and hide them.
function smooth(cells, rows, columns) {
  const sigma = SMOOTHING * Math.max(rows, columns), radius = Math.ceil(4 * sigma);
  const kernel = Array.from({ length: 2 * radius + 1 }, (_, at) => Math.exp(-((at - radius) ** 2) / (2 * sigma ** 2)));
  const sum = kernel.reduce((total, weight) => total + weight);
  const mirror = (at, count) => count === 1 ? 0 : Math.abs((at + 2 * (count - 1)) % (2 * (count - 1)) > count - 1
    ? 2 * (count - 1) - (at + 2 * (count - 1)) % (2 * (count - 1)) : (at + 2 * (count - 1)) % (2 * (count - 1)));
  const pass = (source, along) => source.map((_, cell) => {
    const row = Math.floor(cell / columns), column = cell % columns;
    let value = 0;
    kernel.forEach((weight, at) => {
      value += weight * (along ? source[row * columns + mirror(column + at - radius, columns)]
        : source[mirror(row + at - radius, rows) * columns + column]);
    });
    return value / sum;
  });
  const blurred = pass(pass(cells, true), false);
  const sorted = Float32Array.from(blurred).sort();
  const top = sorted[Math.round(PERCENTILE * (sorted.length - 1))] || sorted.at(-1);
  return blurred.map((value) => top ? Math.min(value / top, 1) : 0);
}

const arrayRecord = (manifest) => {
  const records = (manifest.explanations || []).flatMap((one) => one.artifacts || []);
  return records.find((one) => one.kind === "heatmap" && one.shape);
};

// Where an artifact can be read: as `urls` says, else beside the manifest.
function addressOf(uri, urls, base) {
  if (urls[uri]) return urls[uri];
  return base ? new URL(encodeURIComponent(uri.split("/").at(-1)), base).href : uri;
}

// What is drawn, from a manifest or a viewer document.
async function read(json, base) {
  const document = json.manifest ? json : { manifest: json };
  const { manifest, urls = {} } = document;
  if (!manifest || !Array.isArray(manifest.explanations)) throw new Error("This is no manifest of an image.");
  let found = document.maps ? decodeMaps(document.maps) : null;
  const record = arrayRecord(manifest);
  if (!found && document.heatmaps) found = arrayOf(bytes(document.heatmaps), "heatmaps");
  else if (!found && record) {
    const answer = await fetch(addressOf(record.uri, urls, base));
    if (!answer.ok) throw new Error(`The heatmaps cannot be read (HTTP ${answer.status}).`);
    found = arrayOf(new Uint8Array(await answer.arrayBuffer()), "heatmaps");
  }
  const method = manifest.method || {};
  const { width = 1, height = 1, uri = "" } = manifest.input || {};
  const shown = manifest.network?.shown_xyxy;
  const isSmoothed = method.name === "integrated_gradients";
  let maps = found?.maps.map((cells) => cells.map((value) => Number.isFinite(value) ? Math.max(value, 0) : 0));
  const most = maps ? Math.max(...maps.map((cells) => cells.reduce((top, value) => Math.max(top, value), 0))) : 0;
  if (most > 1) maps = maps.map((cells) => cells.map((value) => value / most));  // `none` does not scale
  if (maps && isSmoothed && !document.maps) maps = maps.map((cells) => smooth(cells, found.rows, found.columns));
  const classes = manifest.explanations.map((one, index) => {
    const record = (one.artifacts || []).find(({ kind, index: slice }) => kind === "heatmap" && slice !== undefined);
    return { ...one.class, rank: one.rank, probability: one.probability, rawMin: one.raw_min, rawMax: one.raw_max,
      metrics: one.metrics || {}, completeness: one.completeness_error ?? null, cells: maps?.[record?.index ?? index],
      overlay: (one.artifacts || []).filter(({ kind }) => kind === "overlay").map((own) => urls[own.uri]).find(Boolean) };
  });
  if (maps && classes.some(({ cells }) => !cells)) throw new Error("There are fewer heatmaps than classes.");
  const placement = document.placement || (shown
    ? [shown[0] / width, shown[1] / height, shown[2] / width, shown[3] / height] : [0, 0, 1, 1]);
  for (const one of classes) {
    if (!one.cells) continue;
    one.peak = one.cells.reduce((most, value) => Math.max(most, value), 0);
    one.isZero = !strongest(one.cells, found.rows, found.columns, placement);
  }
  const photo = document.photo || urls[uri] || (/^(https?|data|file):/.test(uri) ? uri : null);
  return {
    classes, photo, width, height, method, isSmoothed, rows: found?.rows, columns: found?.columns,
    grid: document.maps?.grid || (found && [found.rows, found.columns]),
    placement, boxes: document.boxes || [], predictions: manifest.predictions || [], against: manifest.against || [], warnings: manifest.warnings || [],
    network: manifest.network || {},
  };
}

// ---------------------------------------------------------------- from cells to colours, as the worker draws

// Where each pixel lies between two cells, whose values are held in their middles. The cells lie from one share
// of the pixels to another; of a pixel that is not on them there is nothing. `isFlat`: each cell as it is.
function between(pixels, cells, from, to, isFlat) {
  return Array.from({ length: pixels }, (_, pixel) => position((pixel + 0.5) / pixels, cells, from, to, isFlat));
}

function position(at, cells, from, to, isFlat) {
  const share = (at - from) / (to - from);
  if (share < 0 || share >= 1) return undefined;
  if (isFlat) return [Math.floor(share * cells), Math.floor(share * cells), 0];
  const place = Math.min(Math.max(share * cells - 0.5, 0), cells - 1);
  const first = Math.floor(place);
  return [first, Math.min(first + 1, cells - 1), place - first];
}

// The greatest of the cells whose middles are on the photo: the others are on the padding around it.
function strongest(cells, rows, columns, [left, top, right, bottom]) {
  const isOn = (cell, count, from, to) => {
    const middle = from + (cell + 0.5) / count * (to - from);
    return middle >= 0 && middle <= 1;
  };
  return cells.reduce((most, value, cell) =>
    isOn(cell % columns, columns, left, right) && isOn(Math.floor(cell / columns), rows, top, bottom)
      ? Math.max(most, value) : most, 0);
}

// Cells (rows x columns) -> levels (0 to 255), one for each pixel: bilinear, the peak kept as it was. The cells
// lie on the part of the photo that the network was shown; elsewhere the level is -1.
function enlarge(cells, rows, columns, width, height, placement = [0, 0, 1, 1], isFlat = false) {
  const [left, top, right, bottom] = placement;
  const across = between(width, columns, left, right, isFlat), down = between(height, rows, top, bottom, isFlat);
  const wide = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    const from = row * columns;
    across.forEach((seen, x) => {
      if (!seen) return;
      const [first, second, share] = seen;
      wide[row * width + x] = cells[from + first] * (1 - share) + cells[from + second] * share;
    });
  }
  const firstX = Math.max(across.findIndex(Boolean), 0), endX = across.findLastIndex(Boolean) + 1;
  const large = new Float32Array(width * height);
  let peak = 0;
  down.forEach((seen, y) => {
    if (!seen) return;
    const above = seen[0] * width, below = seen[1] * width, share = seen[2], from = y * width;
    for (let x = firstX; x < endX; x++) {
      const value = wide[above + x] * (1 - share) + wide[below + x] * share;
      large[from + x] = value;
      if (value > peak) peak = value;
    }
  });
  const scale = peak > 0 ? 255 * Math.max(strongest(cells, rows, columns, placement) / peak, 1) : 0;
  const levels = new Int16Array(width * height).fill(-1);
  const rounded = new Uint8ClampedArray(1);  // a clamped array rounds what is put into it
  down.forEach((seen, y) => {
    if (!seen) return;
    for (let pixel = y * width + firstX, end = y * width + endX; pixel < end; pixel++) {
      rounded[0] = large[pixel] * scale;
      levels[pixel] = rounded[0];
    }
  });
  return levels;
}

// Levels in the colours of a table (256 x RGB); those below `least`, and those below 0, stay clear.
function paint(levels, table, least, canvas) {
  const image = new ImageData(canvas.width, canvas.height);
  const { data: pixels } = image;
  for (let pixel = 0; pixel < levels.length; pixel++) {
    const level = levels[pixel];
    if (level < 0 || level < least) continue;
    pixels[4 * pixel] = table[3 * level];
    pixels[4 * pixel + 1] = table[3 * level + 1];
    pixels[4 * pixel + 2] = table[3 * level + 2];
    pixels[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The value of a map at shares of the photo's sides, and its cell; nothing where the map does not lie.
function valueAt(map, view, u, v, isFlat) {
  const [left, top, right, bottom] = view.placement;
  const across = position(u, view.columns, left, right, isFlat), down = position(v, view.rows, top, bottom, isFlat);
  if (!across || !down) return undefined;
  const at = (row, column) => map[row * view.columns + column];
  const row = (index) => at(index, across[0]) * (1 - across[2]) + at(index, across[1]) * across[2];
  return row(down[0]) * (1 - down[2]) + row(down[1]) * down[2];
}

// Where a map is strongest, in words.
function whereStrongest(map, view) {
  const { rows, columns, placement: [left, top, right, bottom] } = view;
  let best = -1, share = 0, count = 0;
  const peak = strongest(map, rows, columns, view.placement);
  if (!peak) return "";
  map.forEach((value, cell) => {
    const u = left + (cell % columns + 0.5) / columns * (right - left);
    const v = top + (Math.floor(cell / columns) + 0.5) / rows * (bottom - top);
    if (u < 0 || u > 1 || v < 0 || v > 1) return;
    count++;
    if (value >= peak / 2) share++;
    if (value === peak && best < 0) best = cell;
  });
  const third = (at, names) => names[Math.min(Math.max(Math.floor(3 * at), 0), 2)];
  const u = left + (best % columns + 0.5) / columns * (right - left);
  const v = top + (Math.floor(best / columns) + 0.5) / rows * (bottom - top);
  const place = [third(v, ["top", "middle", "bottom"]), third(u, ["left", "centre", "right"])].join(" ");
  const named = place === "middle centre" ? "in the centre" : `at the ${place.replace("middle ", "").replace(" centre", "")}`;
  return `Strongest ${named} of the photo; ${Math.round(100 * share / count)} % of it has at least half of the peak.`;
}

// ---------------------------------------------------------------- the colour maps, 256 x RGB in base64, as the worker draws them

const TABLES = {
  viridis: "RAFURAJWRQRXRQVZRgdaRghcRgpdRgteRw1gRw5hRxBjRxFkRxNlSBRnSBZoSBdpSBhqSBpsSBttSBxuSB1vSB9wSCBxSCFzSCN0SCR1SCV2SCZ3SCh4SCl5Ryp6Ryx6Ry17Ry58Ry99RjB+RjJ+RjN/RjSARTWBRTeBRTiCRDmDRDqDRDuEQz2EQz6FQj+FQkCGQkGGQUKHQUSHQEWIQEaIP0eIP0iJPkmJPkqJPkyKPU2KPU6KPE+KPFCLO1GLO1KLOlOLOlSMOVWMOVaMOFiMOFmMN1qMN1uNNlyNNl2NNV6NNV+NNGCNNGGNM2KNM2ONMmSOMmWOMWaOMWeOMWiOMGmOMGqOL2uOL2yOLm2OLm6OLm+OLXCOLXGOLHGOLHKOLHOOK3SOK3WOKnaOKneOKniOKXmOKXqOKXuOKHyOKH2OJ36OJ3+OJ4COJoGOJoKOJoKOJYOOJYSOJYWOJIaOJIeOI4iOI4mOI4qNIouNIoyNIo2NIY6NIY+NIZCNIZGMIJKMIJKMIJOMH5SMH5WLH5aLH5eLH5iLH5mKH5qKHpuKHpyJHp2JH56JH5+IH6CIH6GIH6GHH6KHIKOGIKSGIaWFIaaFIqeFIqiEI6mDJKqDJauCJayCJq2BJ62BKK6AKa9/KrB/LLF+LbJ9LrN8L7R8MbV7MrZ6NLZ5Nbd5N7h4OLl3Orp2O7t1Pbx0P7xzQL1yQr5xRL9wRsBvSMFuSsFtTMJsTsNrUMRqUsVpVMVoVsZnWMdlWshkXMhjXsliYMpgY8tfZcteZ8xcac1bbM1abs5YcM9Xc9BWddBUd9FTetFRfNJQf9NOgdNNhNRLhtVJidVIi9ZGjtZFkNdDk9dBldhAmNg+m9k8ndk7oNo5oto3pds2qNs0qtwyrdwwsN0vst0ttd4ruN4put4ovd8mwN8lwt8jxeAhyOAgyuEfzeEd0OEc0uIb1eIa2OIZ2uMZ3eMY3+MY4uQY5eQZ5+QZ6uUa7OUb7+Uc8eUd9OYe9uYg+OYh++cj/ecl",
  inferno: "AAAEAQAFAQEGAQEIAgEKAgIMAgIOAwIQBAMSBAMUBQQXBgQZBwUbCAUdCQYfCgciCwckDAgmDQgpDgkrEAktEQowEgoyFAs0FQs3Fgs5GAw8GQw+GwxBHAxDHgxFHwxIIQxKIwxMJAxPJgxRKAtTKQtVKwtXLQtZLwpbMQpcMgpeNApfNglhOAliOQljOwlkPQllPglmQApnQgpoRApoRQppRwtqSQtqSgxrTAxrTQ1sTw1sUQ5sUg5tVA9tVQ9tVxBuWRBuWhFuXBJuXRJuXxNuYRNuYhRuZBVuZRVuZxZuaRZuahdubBhubRhubxlucRluchpudBpudRtudxxteBxteh1tfB1tfR5tfx5sgB9sgiBshCBrhSFrhyFriCJqiiJqjCNpjSNpjyRpkCVokiVokyZnlSZnlydmmCdmmihlmylknSlknypjoCpjoitioyxhpSxgpi1gqC5fqS5eqy9erTBdrjBcsDFbsTJaszJatDNZtjRYtzVXuTVWujZVvDdUvThTvzlSwDpRwTpQwztPxDxOxj1Nxz5MyD9LykBKy0FJzEJIzkNHz0RG0EVF0kZE00dD1EhC1UpB10s/2Ew+2U092k4821A73VE63lI431M34FU24VY14lc041kz5Fox5Vww5l0v514u6GAt6WEr6mMq62Qp62Yo7Gcm7Wkl7mok72wj724h8G8g8XEf8XMd8nQc83Yb83gZ9HkY9XsX9X0V9n4U9oAT94IS94QQ+IUP+IcO+IkM+YsL+YwK+Y4J+pAI+pIH+pQH+5YG+5cG+5kG+5sG+50H/J8H/KEI/KMJ/KUK/KYM/KgN/KoP/KwR/K4S/LAU/LIW/LQY+7Ya+7gd+7of+7wh+74j+sAm+sIo+sQq+sYt+ccv+cky+cs1+M03+M8699E999NA9tVD9tdG9dlJ9dtM9N1P9N9T9OFW8+Na8+Vd8uZh8uhl8upp8ext8e1x8e918fF58vJ98vSC8/WG8/aK9PiO9fmS9vqW+Pua+fyd+v2h/P+k",
  magma: "AAAEAQAFAQEGAQEIAgEJAgILAgINAwMPAwMSBAQUBQQWBgUYBgUaBwYcCAceCQcgCggiCwkkDAkmDQopDgsrEAstEQwvEg0xEw00FA42FQ44Fg87GA89GRA/GhBCHBBEHRFHHhFJIBFLIRFOIhFQJBJTJRJVJxJYKRFaKhFcLBFfLRFhLxFjMRFlMxBnNBBpNhBrOBBsOQ9uOw9wPQ9xPw9yQA90Qg91RA92RRB3RxB4SRB4ShB5TBF6ThF7TxJ7URJ8UhN8VBN9VhR9VxV+WRV+WhZ+XBZ/XRd/Xxh/YBiAYhmAZBqAZRqAZxuAaByBahyBax2BbR2Bbh6BcB+Bch+BcyCBdSGBdiGBeCKBeSKCeyOCfCOCfiSCgCWCgSWBgyaBhCaBhieBiCeBiSiBiymBjCmBjiqBkCqBkSuBkyuAlCyAliyAmC2AmS2Amy5/nC5/ni9/oC9/oTB+ozB+pTF+pjF9qDJ9qjN9qzN8rTR8rjR7sDV7sjV7szZ6tTZ6tzd5uDd5ujh4vDl4vTl3vzp3wDp2wjt1xDx1xTx0xz1zyD5zyj5yzD9xzUBxz0Bw0EFv0kJv00Nu1URt1kVs2EVs2UZr20dq3Ehp3klo30po4Exn4k1m405l5E9k5VBk51Jj6FNi6VRi6lZh61dg7Fhg7Vpf7lte711e8F9e8WBd8mJd8mRc82Vc9Gdc9Glc9Wtc9mxc9m5c93Bc93Jc+HRc+HZc+Xhd+Xld+Xtd+n1e+n9e+oFf+4Nf+4Vg+4dh/Ilh/Ipi/Ixj/I5k/JBl/ZJm/ZRn/ZZo/Zhp/Zpq/Ztr/p1s/p9t/qFu/qNv/qVx/qdy/qlz/qp0/qx2/q53/rB4/rJ6/rR7/rZ8/rd+/rl//ruB/r2C/r+E/sGF/sKH/sSI/saK/siM/sqN/syP/s2Q/s+S/tGU/tOV/tWX/teZ/tia/dqc/dye/d6g/eCh/eKj/eOl/eWn/eep/emq/eus/Oyu/O6w/PCy/PK0/PS2/Pa4/Pe5/Pm7/Pu9/P2/",
  plasma: "DQiHEAeIEweJFgeKGQaMGwaNHQaOIAaPIgaQJAaRJgWRKAWSKgWTLAWULgWVLwWWMQWXMwWXNQSYNwSZOASaOgSaPASbPgScPwScQQSdQwOeRAOeRgOfSAOfSQOgSwOhTAKhTgKiUAKiUQKjUwKjVQKkVgGkWAGkWQGlWwGlXAGmXgGmYAGmYQCnYwCnZACnZgCnZwCoaQCoagCobACobgCobwCocQCocgGodAGodQGodwGoeAGoegKoewKofQOofgOogASogQSngwWnhAWnhgamhwemiAimigmliwqljQuljgykjw2kkQ6jkg+jlBCilRGhlhOhmBSgmRWfmhafnBeenRidnhmdoBqcoRuboh2aox6apR+ZpiCYpyGXqCKWqiOVqySUrCaUrSeTriiSsCmRsSqQsiuPsyyOtC6NtS+MtjCLtzGKuDKJujOIuzSIvDWHvTeGvjiFvzmEwDqDwTuCwjyBwz2AxD5/xUB+xkF9x0J8yEN7yUR6ykV6y0Z5zEd4zEl3zUp2zkt1z0x00E1z0U5y0k9x01Fx1FJw1VNv1VRu1lVt11Zs2Fdr2Vhq2lpq2ltp21xo3F1n3V5m3l9l3mFk32Jj4GNj4WRi4mVh4mZg42hf5Gle5Wpd5Wtd5mxc525b529a6HBZ6XFY6XJX6nRX63VW63ZV7HdU7XlT7XpS7ntR73xR735Q8H9P8IBO8YFN8YNM8oRL84VL84dK9IhJ9IlI9YtH9YxG9o1F9o9E95BE95FD95NC+JRB+JVA+Zc/+Zg++Zo++ps9+pw8+p47+586+6E5+6I4/KM4/KU3/KY2/Kg1/Kk0/asz/awz/a4y/a8x/bEw/bIv/bQv/bUu/rct/rgs/ros/rsr/r0q/r4q/sAp/cIp/cMo/cUn/cYn/cgn/com/csm/M0l/M4l/NAl/NIl+9Mk+9Uk+9ck+tgk+tok+dwk+d0l+N8l+OEl9+Il9+Ql9uYm9ugm9ekm9esn9O0n8+4n8/An8vIn8fQm8fUl8Pck8Pkh",
  cividis: "ACJOACNPACRRACVTACVUACZWACdYAChZAChbACldACpfACphACtiACxkACxmAC1oAC5qAC5sAC9tADBvADBwADFwADFxATJxBTNxCDNwDDRwDzVwEjVwFDZwFjdwGDdvGjhvHDlvHjpvIDpvITtuIzxuJDxuJj1uJz5uKT9uKj9tK0BtLUFtLkFtL0JtMUNtMkNtM0RtNEVsNUVsNkZsOEdsOUhsOkhsO0lsPEpsPUpsPktsP0xsQExsQU1sQk5sQ05sRE9sRVBsRlFsR1FsSFJsSVNsSlNsS1RsTFVsTVVsTlZsT1dsUFdsUVhtUlltU1ptVFptVVttVVxtVlxtV11tWF5tWV5uWl9uW2BuXGFuXWFuXmJuXmNvX2NvYGRvYWVvYmVvY2ZwZGdwZWhwZWhwZmlwZ2pxaGpxaWtxamxxa21ybG1ybG5ybW9ybm9zb3BzcHFzcXJ0cnJ0cnN0c3R1dHR1dXV1dnZ2d3d2d3d3eHh3eXl3enp4e3p4fHt4fXx4fnx4fn14f354gH94gX94goB5g4F5hIJ5hYJ5hoN5h4R4iIV4iYV4ioZ4i4d4jIh4jYh4jol4j4p4kIt4kYt4kox4ko14k454lI53lY93lpB3l5F3mJJ3mZJ3mpN2m5R2nJV2nZV2npZ2n5d1oJh1oZl1opl1o5p0pJt0pZx0ppx0p51zqJ5zqZ9zqqBzq6ByrKFyraJyrqNxr6RxsKVxsaVws6ZwtKdvtahvtqlvt6luuKpuuattuqxtu61tvK5sva5svq9rv7BrwLFqwbJqwrNpw7NpxLRoxbVoxrZnx7dnyLhmyblly7llzLpkzbtjzrxjz71i0L5i0b9h0sBg08Bf1MFf1cJe1sNd18Rc2cVc2sZb28da3MhZ3chY3slY38pX4MtW4cxV4s1U5M5T5c9S5tBR59FQ6NJP6dNO6tNM69RL7dVK7tZJ79dI8NhG8dlF8tpE89tC9dxB9t0/994++N88+eA6++E4/OI2/eM0/uQ0/uU1/uY2/ug4",
  turbo: "MBI7MhVDMxhKNBtRNR5YNiFfNyRmOCdtOSpzOi15Oy+APDKGPTWLPjiRPzuXPz6cQECiQUOnQUasQkmxQku1Q066RFG/RFTDRFbHRVnLRVzPRV7TRmHWRmTaRmbdRmngRmvjR27mR3HpR3PrR3buR3jwR3vyRn30RoD2RoL4RoX6Rof7RYr8RYz9RI/+Q5H+QpT/QZb/QJn/Ppv+PZ7+O6D9OqP8OKX7N6j6Nav4M633Ma/1L7L0LrTyLLfwKrnuKLzrJ77pJcDnI8PkIsXiIMffH8ndHsvaHM3YG9DVGtLSGtTQGdXNGNfKGNnIGNvFGN3CGN7AGOC9GeK7GeO5GuS2HOa0HeeyH+mvIOqsIuuqJeynJ+6kKu+hLPCeL/GbMvKYNfOUOPSRPPWOP/aKQ/eHRviESviATvl9Uvp6Vfp2WftzXfxvYfxsZf1paf1mbf5icf5fdf5cef5Zff9WgP9ThP9RiP9Oi/9Lj/9Jkv9Hlv5Emf5CnP5An/0/of09pPw8p/w6qfs5rPs4r/o3sfk2tPg2t/c1ufY1vPU0vvQ0wfM0w/E0xvA0yO80y+00zew00Oo00uk11Oc11+U12eQ22+I23eA339834d0349s45dk459c56dU569M57NE67s8678068cs68sk69Mc69cU69sM698E6+L45+bw5+ro5+7g4+7Y3/LM2/LE2/a41/aw0/qkz/qcy/qQx/qEw/p4v/pst/pks/pYr/pMq/pAp/Y0n/Yom/Icl/IQj+4Ei+34h+nsf+Xge+XUd+HIc928a9mwZ9WkY9GYX82MV8mAU8V0T8FsS71gR7VUQ7FMP61AO6k4N6EsM50kM5UcL5EUK4kMK4UEJ3z8I3T0I3DsH2jkH2DcG1jUG1DMF0jEF0C8Fzi0EzCsEyioEyCgDxSYDwyUDwSMCviECvCACuR4Ctx0CtBsBshoBrxgBrBcBqRYBpxQBpBMBoRIBnhABmw8BmA4BlQ0BkgsBjgoBiwkCiAgChQcCgQYCfgUCegQD",
  jet: "AACAAACEAACIAACMAACQAACUAACYAACcAACgAACkAACoAACsAACwAAC0AAC4AAC8AADAAADEAADIAADMAADQAADUAADYAADcAADgAADkAADoAADsAADwAAD0AAD4AAD8AAD/AAT/AAj/AAz/ABD/ABT/ABj/ABz/ACD/ACT/ACj/ACz/ADD/ADT/ADj/ADz/AED/AET/AEj/AEz/AFD/AFT/AFj/AFz/AGD/AGT/AGj/AGz/AHD/AHT/AHj/AHz/AID/AIT/AIj/AIz/AJD/AJT/AJj/AJz/AKD/AKT/AKj/AKz/ALD/ALT/ALj/ALz/AMD/AMT/AMj/AMz/AND/ANT/ANj/ANz/AOD/AOT/AOj/AOz/APD/APT/APj/APz/Av/+Bv/6Cv/2Dv/yEv/uFv/qGv/mHv/iIv/eJv/aKv/WLv/SMv/ONv/KOv/GPv/CQv++Rv+6Sv+2Tv+yUv+uVv+qWv+mXv+iYv+eZv+aav+Wbv+Scv+Odv+Kev+Gfv+Cgv9+hv96iv92jv9ykv9ulv9qmv9mnv9iov9epv9aqv9Wrv9Ssv9Otv9Kuv9Gvv9Cwv8+xv86yv82zv8y0v8u1v8q2v8m3v8i4v8e5v8a6v8W7v8S8v8O9v8K+v8G/v8B//wA//gA//QA//AA/+wA/+gA/+QA/+AA/9wA/9gA/9QA/9AA/8wA/8gA/8QA/8AA/7wA/7gA/7QA/7AA/6wA/6gA/6QA/6AA/5wA/5gA/5QA/5AA/4wA/4gA/4QA/4AA/3wA/3gA/3QA/3AA/2wA/2gA/2QA/2AA/1wA/1gA/1QA/1AA/0wA/0gA/0QA/0AA/zwA/zgA/zQA/zAA/ywA/ygA/yQA/yAA/xwA/xgA/xQA/xAA/wwA/wgA/wQA/wAA/AAA+AAA9AAA8AAA7AAA6AAA5AAA4AAA3AAA2AAA1AAA0AAAzAAAyAAAxAAAwAAAvAAAuAAAtAAAsAAArAAAqAAApAAAoAAAnAAAmAAAlAAAkAAAjAAAiAAAhAAAgAAA",
  grey: "AAAAAQEBAgICAwMDBAQEBQUFBgYGBwcHCAgICQkJCgoKCwsLDAwMDQ0NDg4ODw8PEBAQEREREhISExMTFBQUFRUVFhYWFxcXGBgYGRkZGhoaGxsbHBwcHR0dHh4eHx8fICAgISEhIiIiIyMjJCQkJSUlJiYmJycnKCgoKSkpKioqKysrLCwsLS0tLi4uLy8vMDAwMTExMjIyMzMzNDQ0NTU1NjY2Nzc3ODg4OTk5Ojo6Ozs7PDw8PT09Pj4+Pz8/QEBAQUFBQkJCQ0NDRERERUVFRkZGR0dHSEhISUlJSkpKS0tLTExMTU1NTk5OT09PUFBQUVFRUlJSU1NTVFRUVVVVVlZWV1dXWFhYWVlZWlpaW1tbXFxcXV1dXl5eX19fYGBgYWFhYmJiY2NjZGRkZWVlZmZmZ2dnaGhoaWlpampqa2trbGxsbW1tbm5ub29vcHBwcXFxcnJyc3NzdHR0dXV1dnZ2d3d3eHh4eXl5enp6e3t7fHx8fX19fn5+f39/gICAgYGBgoKCg4ODhISEhYWFhoaGh4eHiIiIiYmJioqKi4uLjIyMjY2Njo6Oj4+PkJCQkZGRkpKSk5OTlJSUlZWVlpaWl5eXmJiYmZmZmpqam5ubnJycnZ2dnp6en5+foKCgoaGhoqKio6OjpKSkpaWlpqamp6enqKioqampqqqqq6urrKysra2trq6ur6+vsLCwsbGxsrKys7OztLS0tbW1tra2t7e3uLi4ubm5urq6u7u7vLy8vb29vr6+v7+/wMDAwcHBwsLCw8PDxMTExcXFxsbGx8fHyMjIycnJysrKy8vLzMzMzc3Nzs7Oz8/P0NDQ0dHR0tLS09PT1NTU1dXV1tbW19fX2NjY2dnZ2tra29vb3Nzc3d3d3t7e39/f4ODg4eHh4uLi4+Pj5OTk5eXl5ubm5+fn6Ojo6enp6urq6+vr7Ozs7e3t7u7u7+/v8PDw8fHx8vLy8/Pz9PT09fX19vb29/f3+Pj4+fn5+vr6+/v7/Pz8/f39/v7+////",
};

// ---------------------------------------------------------------- the element

const STYLE = `
:host {
  --ink: light-dark(#1b2126, #e6eaed); --quiet: light-dark(#57616a, #a3adb5); --line: light-dark(#dbe0e4, #343b41);
  --ground: light-dark(#fff, #1c2125); --track: light-dark(#e8ecef, #2c3338); --chosen: light-dark(#e4eff7, #20384a);
  --accent: var(--gradcam-accent, light-dark(#0b5a8f, #79bdec)); --warn: light-dark(#fdf3d8, #3d3315);
  --warn-line: light-dark(#c08a00, #d9a520);
  display: block; container-type: inline-size; color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; text-align: start;
}
:host([hidden]), [hidden] { display: none !important; }
* { box-sizing: border-box; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
h3 { margin: 0 0 6px; font-size: .95rem; font-weight: 600; }
h3 span { color: var(--quiet); font-weight: 400; }
p { margin: 0; }
.viewer { display: grid; grid-template: "pictures classes" auto "pictures settings" 1fr "notes settings" auto / minmax(0, 1fr) 330px; gap: 12px 24px; }
.viewer.alone { grid-template: "pictures settings" auto "notes settings" 1fr / minmax(0, 1fr) 330px; }
.classes { grid-area: classes; min-width: 0; }
.pictures { grid-area: pictures; min-width: 0; border-radius: 4px; }
.settings { grid-area: settings; display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px 18px; align-content: start; margin: 0; }

.list {
  position: relative; max-height: 218px; overflow-y: auto; margin: 0 -4px; padding: 3px; scrollbar-gutter: stable;
  scrollbar-width: thin; scrollbar-color: var(--quiet) var(--track);
}
.list.more { mask-image: linear-gradient(#000 calc(100% - 26px), #0004); }
.tabs { display: grid; gap: 2px; }
.one {
  display: grid; grid-template-columns: auto minmax(0, 1fr) auto; gap: 0 8px; width: 100%; padding: 5px 8px 6px; border: 0;
  border-radius: 6px; background: none; color: inherit; font: inherit; line-height: 1.35; text-align: start;
}
[role=tab] { cursor: pointer; }
[role=tab]:hover { background: color-mix(in srgb, var(--track) 60%, transparent); }
[role=tab][aria-selected=true] { background: var(--chosen); box-shadow: inset 3px 0 var(--accent); }
.rank { color: var(--quiet); }
.name { overflow-wrap: anywhere; unicode-bidi: isolate; }
.bar { grid-column: 1 / -1; height: 4px; margin-top: 4px; border-radius: 2px; background: var(--track); overflow: hidden; }
.bar div { height: 100%; width: var(--share); background: var(--accent); }
.others { margin-top: 10px; font-size: .9rem; }
.others > summary { cursor: pointer; color: var(--quiet); }

.panes { display: flex; gap: 12px; justify-content: center; align-items: flex-start; }
figure { flex: 0 1 auto; margin: 0; min-width: 0; width: min(100%, max(var(--tall, 54vh) * var(--ratio), 60px)); }
.panes.two figure { flex: 1 1 0; width: auto; max-width: calc(var(--tall, 54vh) * var(--ratio)); }
figcaption { display: flex; gap: 8px; justify-content: space-between; margin-bottom: 4px; font-weight: 600; }
.frame {
  position: relative; aspect-ratio: var(--ratio); overflow: hidden; border-radius: 4px; background: var(--track);
  cursor: crosshair; touch-action: pan-x pan-y; user-select: none; -webkit-user-select: none;
}
.frame.zoomed { cursor: grab; touch-action: none; }
.frame.held { cursor: grabbing; }
.frame.plain { background: repeating-conic-gradient(var(--track) 0 25%, var(--ground) 0 50%) 0 0 / 24px 24px; }
.stage { position: absolute; inset: 0; transform-origin: 0 0; }
.stage > * { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.stage canvas { opacity: var(--opacity); }
.stage canvas.flat { image-rendering: pixelated; }
svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; fill: none; }
svg path { vector-effect: non-scaling-stroke; }
.under { stroke: #000a; stroke-width: 2px; }
.over { stroke: #fffc; stroke-width: 1px; }
.box.under { stroke-width: 4px; }
.box.over { stroke: #fff; stroke-width: 2px; }
.probe { position: absolute; width: 17px; height: 17px; margin: -8.5px; border-radius: 50%; border: 2px solid #fff; box-shadow: 0 0 0 1.5px #000, inset 0 0 0 1.5px #000; pointer-events: none; }

.tools { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-top: 8px; min-height: 34px; font-size: .9rem; }
.tools .buttons { display: flex; gap: 4px; }
button.tool { min-width: 34px; min-height: 34px; padding: 2px 9px; border: 1px solid var(--line); border-radius: 6px; background: var(--ground); color: inherit; font: inherit; cursor: pointer; }
button.tool:disabled { opacity: .45; cursor: default; }
.check { display: flex; gap: 7px; align-items: center; }
.check input { width: 17px; height: 17px; min-height: 0; margin: 0; accent-color: var(--accent); }
.value { flex: 1 1 15em; min-height: 1.5em; color: var(--quiet); text-align: end; }
.value b { color: var(--ink); font-weight: 600; }

.legend { position: relative; margin-top: 10px; }
.legend canvas { display: block; width: 100%; height: 18px; border-radius: 3px; background: var(--track); }
.peak { position: absolute; top: -3px; width: 0; height: 24px; border-left: 2px solid var(--ink); margin-left: -1px; box-shadow: 0 0 0 1px var(--ground); }
.ends { display: flex; justify-content: space-between; gap: 12px; margin-top: 2px; font-size: .82rem; color: var(--quiet); }
.ends span:last-child { text-align: end; overflow-wrap: anywhere; }
.bar, .bar div, .legend canvas, .peak { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.notes { grid-area: notes; display: grid; gap: 6px; align-content: start; min-width: 0; font-size: .9rem; }
.said { color: var(--quiet); overflow-wrap: anywhere; }
.pictures .said { margin-top: 8px; font-size: .9rem; }
.said.mark { padding: 5px 11px; border-left: 3px solid var(--warn-line); background: var(--warn); color: var(--ink); }
dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 2px 14px; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; }
dd span { color: var(--quiet); }

.field { min-width: 0; }
.wide { grid-column: 1 / -1; }
.row { display: flex; justify-content: space-between; gap: 10px; font-size: .9rem; }
output { color: var(--quiet); }
.settings input[type=range], select { width: 100%; min-height: 30px; margin: 0; font: inherit; font-size: .95rem; accent-color: var(--accent); }
select { padding: 3px 6px; border: 1px solid var(--line); border-radius: 6px; background: var(--ground); color: inherit; text-overflow: ellipsis; }
.problem { padding: 10px 14px; border-left: 3px solid var(--warn-line); background: var(--warn); overflow-wrap: anywhere; }
.plain-overlays { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
.plain-overlays img { width: 100%; border-radius: 4px; }
.quietly { position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }

@container (max-width: 759px) {
  .viewer { grid-template: "classes" auto "pictures" auto "settings" auto "notes" auto / minmax(0, 1fr); }
  .viewer.alone { grid-template: "pictures" auto "settings" auto "notes" auto / minmax(0, 1fr); }
  .list { max-height: none; overflow: auto hidden; scrollbar-gutter: auto; padding-bottom: 6px; }
  .list.more { mask-image: linear-gradient(90deg, #000 calc(100% - 26px), #0004); }
  .others .list { max-height: 218px; overflow: hidden auto; mask-image: none; }
  .tabs { display: flex; gap: 4px; width: max-content; }
  [role=tab] { width: auto; max-width: 62cqw; min-height: 44px; }
  [role=tab] .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
  [role=tab][aria-selected=true] { box-shadow: inset 0 -3px var(--accent); }
  .panes.two { flex-direction: column; align-items: center; }
  .panes.two figure { flex: none; width: min(100%, calc(var(--tall, 54vh) * var(--ratio))); }
  button.tool { min-width: 44px; min-height: 40px; }
  .check { min-height: 40px; }
  .settings input[type=range], select { min-height: 40px; }
  .value { text-align: start; flex-basis: 100%; }
}
@media print {
  :host { color-scheme: light; }
  .settings, .tools, .others { display: none; }
  .viewer { display: flex; flex-direction: column; }
  .classes { order: 1; }
  .list, .list.more { max-height: none; overflow: visible; mask-image: none; }
  .one { break-inside: avoid; }
  .pictures { break-inside: avoid; margin-top: 12px; }
  figure { max-width: 130mm; }
}`;

const sheet = new CSSStyleSheet();
sheet.replaceSync(STYLE);
const SVG = "http://www.w3.org/2000/svg";

// An element; properties of it, or attributes where the name has a dash or is one of these.
const ATTRIBUTES = new Set(["role", "for", "class", "part"]);
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || ATTRIBUTES.has(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Whether a browser shows a photo on its side: few turn a WebP by its EXIF data, as the worker does.
function isTurned({ naturalWidth, naturalHeight }, width, height) {
  const isNear = (ratio) => Math.abs(Math.log(ratio * naturalHeight / naturalWidth)) < SAME_SHAPE;
  return isNear(height / width) && !isNear(width / height);
}

// One photo with one heatmap over it.
class Pane {
  constructor(viewer, label) {
    this.viewer = viewer;
    this.name = make("span", { class: "name" });
    this.share = make("span");
    this.photo = make("img", { alt: "", decoding: "async", draggable: false });
    this.canvas = make("canvas", { "aria-hidden": "true" });
    this.stage = make("div", { class: "stage" }, this.photo, this.canvas);
    [this.lines, this.boxes] = ["", "box "].map((kind) => ["under", "over"].map((name) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", kind + name);
      return path;
    }));
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("aria-hidden", "true");
    svg.setAttribute("viewBox", "0 0 1 1");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.append(...this.lines, ...this.boxes);
    this.probe = make("div", { class: "probe", hidden: true });
    this.frame = make("div", { class: "frame", role: "application", tabIndex: 0, "aria-label": label,
      "aria-describedby": "keys" }, this.stage, svg, this.probe);
    this.figure = make("figure", {}, make("figcaption", {}, this.name, this.share), this.frame);
    this.listen();
  }

  // The place on the photo, as shares of its sides, of a pointer.
  place(event) {
    const box = this.frame.getBoundingClientRect(), { k, x, y } = this.viewer.zoom;
    const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    return { at, u: (at[0] - x) / k, v: (at[1] - y) / k };
  }

  listen() {
    const { frame, viewer } = this, pointers = new Map();
    frame.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      pointers.set(event.pointerId, event);
      if (viewer.zoom.k > 1 || pointers.size > 1) frame.setPointerCapture(event.pointerId);
      viewer.probeAt(this.place(event));
    });
    frame.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (before) {
        const box = frame.getBoundingClientRect();
        const others = [...pointers.values()].filter(({ pointerId }) => pointerId !== event.pointerId);
        if (others.length) {
          const [other] = others, gap = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
          viewer.zoomBy(gap(event) / Math.max(gap(before), 1), this.place(event).at);
        } else if (viewer.zoom.k > 1) {
          frame.classList.add("held");
          viewer.moveBy((event.clientX - before.clientX) / box.width, (event.clientY - before.clientY) / box.height);
        }
        pointers.set(event.pointerId, event);
      }
      viewer.probeAt(this.place(event));
    });
    const release = (event) => {
      pointers.delete(event.pointerId);
      frame.classList.remove("held");
    };
    frame.addEventListener("pointerup", release);
    frame.addEventListener("pointercancel", release);
    frame.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse" && !pointers.has(event.pointerId)) viewer.leave();
    });
    frame.addEventListener("dblclick", (event) => viewer.zoomBy(event.shiftKey ? 0.5 : 2, this.place(event).at));
    frame.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;  // the page scrolls
      event.preventDefault();
      viewer.zoomBy(Math.exp(-Math.max(Math.min(event.deltaY, 100), -100) / 150), this.place(event).at);
    }, { passive: false });
    frame.addEventListener("keydown", (event) => viewer.press(event));
    frame.addEventListener("blur", () => viewer.probeAt(null));
  }
}

class GradcamViewer extends HTMLElement {
  static observedAttributes = ["src", "colormap", "opacity"];

  #view = null;
  #chosen = 0;
  #other = -1;  // the class that is compared with; -1: none
  #probe = null;
  #isByKeys = false;  // the probe was moved by keys
  #asked = 0;  // loads so far: an older one that ends later changes nothing
  #hadScale = null;
  #drawnSize = [1, 1];
  zoom = { k: 1, x: 0, y: 0 };

  constructor() {
    super();
    const root = this.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [sheet];
    const found = new Map();  // by id
    this.$ = (id) => found.get(id);
    const by = (tag, properties, ...children) => {
      const element = make(tag, properties, ...children);
      found.set(properties.id, element);
      return element;
    };
    const tool = (id, text, label) => by("button", { id, class: "tool", type: "button", textContent: text, title: label,
      "aria-label": label });
    const field = (id, label, control, wide, output) => by("div", { id: `${id}-field`, class: wide ? "field wide" : "field" },
      make("div", { class: "row" }, make("label", { for: id, textContent: label }), ...(output ? [output] : [])), control);
    const slider = (id, label, value) => field(id, label, by("input", { id, type: "range", min: 0, max: 100, value }), false,
      by("output", { id: `${id}-value`, for: id }));

    this.panes = [new Pane(this, ""), new Pane(this, "")];
    this.panes[1].figure.hidden = true;
    const classes = by("section", { id: "classes", class: "classes" },
      make("h3", { id: "classes-title" }, "Explained classes ", by("span", { id: "count" })),
      by("div", { id: "list", class: "list" },
        by("div", { id: "tabs", class: "tabs", role: "tablist", "aria-labelledby": "classes-title" })),
      by("details", { id: "others", class: "others", hidden: true }, by("summary", { id: "others-title" }),
        by("div", { id: "others-list", class: "list" })));
    const pictures = by("section", { id: "panel", class: "pictures", role: "tabpanel" },
      by("div", { id: "panes", class: "panes" }, ...this.panes.map(({ figure }) => figure)),
      make("div", { class: "tools" },
        make("div", { class: "buttons", role: "group", "aria-label": "Zoom" }, tool("zoom-out", "\u2212", "Zoom out"),
          tool("zoom-in", "+", "Zoom in"), tool("zoom-whole", "Whole photo", "Show the whole photo")),
        make("label", { class: "check" }, by("input", { id: "cells", type: "checkbox" }), by("span", { id: "cells-label" })),
        by("div", { id: "value", class: "value" })),
      make("div", { class: "legend" }, by("canvas", { id: "legend", width: 256, height: 18, role: "img" }),
        by("div", { id: "peak", class: "peak", hidden: true })),
      make("div", { class: "ends" }, make("span", { textContent: "0" }), by("span", { id: "top" })),
      by("div", { id: "marks" }),
      make("p", { id: "keys", class: "quietly", textContent: "Arrow keys read the map cell by cell. Plus and minus "
        + "zoom, zero shows the whole photo." }),
      by("div", { id: "told", class: "quietly", "aria-live": "polite" }));
    const notes = by("section", { id: "notes", class: "notes", "aria-label": "What the picture tells" });
    const settings = by("form", { id: "settings", class: "settings", autocomplete: "off" },
      slider("opacity", "Opacity", DEFAULT_OPACITY), slider("threshold", "Hide below", 0),
      field("colormap", "Colour map", by("select", { id: "colormap" }, ...Object.keys(TABLES).map((name) =>
        make("option", { value: name, textContent: name }))), false),
      field("compare", "Beside it", by("select", { id: "compare" }), false),
      field("scale", "Scale of the colours", by("select", { id: "scale" },
        make("option", { value: "own", textContent: "Each class to its own peak" }),
        make("option", { value: "common", textContent: "One scale for all classes" })), true),
      by("p", { id: "color-note", class: "wide row", hidden: true }));
    this.viewer = by("div", { id: "viewer", class: "viewer", part: "viewer", hidden: true }, classes, pictures, settings, notes);
    root.append(this.viewer, by("p", { id: "problem", class: "problem", role: "alert", hidden: true }),
      by("div", { id: "overlays", class: "plain-overlays", hidden: true }));

    this.$("list").addEventListener("scroll", () => this.#fadeList(), { passive: true });
    this.$("tabs").addEventListener("keydown", (event) => this.#moveInTabs(event));
    this.$("opacity").addEventListener("input", () => this.#fade());
    for (const id of ["threshold", "colormap", "scale"]) {
      this.$(id).addEventListener(id === "threshold" ? "input" : "change", () => this.#draw());
    }
    this.$("compare").addEventListener("change", () => this.#compare(Number(this.$("compare").value)));
    this.$("cells").addEventListener("change", () => this.#draw());
    this.$("zoom-in").addEventListener("click", () => this.zoomBy(1.6));
    this.$("zoom-out").addEventListener("click", () => this.zoomBy(1 / 1.6));
    this.$("zoom-whole").addEventListener("click", () => this.zoomBy(0));
    this.$("settings").addEventListener("submit", (event) => event.preventDefault());
    this.resizing = new ResizeObserver(() => this.#place());
    this.#fade();
  }

  connectedCallback() {
    if (Object.hasOwn(this, "data")) {  // it was set before this element was defined
      const { data } = this;
      delete this.data;
      this.data = data;
    }
    this.resizing.observe(this.panes[0].frame);
  }

  disconnectedCallback() {
    this.resizing.disconnect();
  }

  attributeChangedCallback(name, _, value) {
    if (name === "src") {
      if (value !== null) this.#load(fetch(new URL(value, document.baseURI), { credentials: "same-origin" }), value);
    } else if (value !== null) {
      this.$(name).value = value;
      this.#fade();
      this.#draw();
    }
  }

  // What is shown, as `src` would hold it. Setting it loads nothing but the photo, and heatmaps that are not in it.
  get data() { return this.given; }
  set data(json) {
    this.given = json;
    this.#load(null, null, json);
  }

  // The index of the class that is shown.
  get selected() { return this.#chosen; }
  set selected(index) { if (this.#view?.classes[index]) this.#choose(index); }

  async #load(request, address, json) {
    const turn = ++this.#asked;
    try {
      if (request) {
        const answer = await request;
        if (!answer.ok) throw new Error(`The data cannot be read (HTTP ${answer.status}).`);
        json = await answer.json();
      }
      if (json === null || json === undefined) return;
      const view = await read(json, address && new URL(address, document.baseURI));
      view.photo = this.getAttribute("photo") || view.photo;
      if (turn === this.#asked) await this.#show(view);
      if (turn === this.#asked) this.#tell("gradcam-load", {});
    } catch (error) {
      if (turn !== this.#asked) return;
      this.viewer.hidden = this.$("overlays").hidden = true;
      this.$("problem").hidden = false;
      this.$("problem").textContent = error instanceof TypeError && request
        ? "The data cannot be read: the server does not answer, or does not allow this page to read it." : error.message;
      this.#tell("gradcam-error", { message: this.$("problem").textContent });
    }
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { bubbles: true, composed: true, detail }));
  }

  async #show(view) {
    this.#view = view;
    this.#chosen = 0;
    this.#other = -1;
    this.#probe = null;
    this.#hadScale = null;
    this.zoom = { k: 1, x: 0, y: 0 };
    const hasMaps = view.classes.length > 0 && view.classes.every(({ cells }) => cells);
    this.$("problem").hidden = hasMaps;
    this.viewer.hidden = !hasMaps;
    this.$("overlays").hidden = hasMaps;
    if (!hasMaps) return this.#showOverlays();
    const size = await this.#loadPhoto(view);
    if (view !== this.#view) return;  // others were given meanwhile
    const finer = Math.max(1, view.columns / size[0], view.rows / size[1]);  // than the photo is the map
    const scale = Math.min(finer, Math.sqrt(MAX_HEAT_PIXELS / (size[0] * size[1])));
    this.#drawnSize = size.map((side) => Math.max(Math.round(side * scale), 1));
    for (const { canvas, figure } of this.panes) {
      [canvas.width, canvas.height] = this.#drawnSize;
      figure.style.setProperty("--ratio", size[0] / size[1]);
    }
    const [columns, rows] = [view.grid[1], view.grid[0]];
    this.$("cells-label").textContent = `Show the map's ${columns} \u00d7 ${rows} cells`;
    this.$("scale").value = view.method.normalize === "per_class" || !view.method.normalize ? "own" : "common";
    this.$("scale-field").hidden = this.$("compare-field").hidden = view.classes.length < 2;
    this.$("compare").replaceChildren(make("option", { value: -1, textContent: "nothing" }),
      ...view.classes.map((one, index) => make("option", { value: index, textContent: `${named(one)}, ${percent(one.probability)}` })));
    this.#list();
    this.#choose(0, true);
    this.#place();
  }

  // The photo's size in pixels; without a photo, the shape that its manifest says.
  async #loadPhoto(view) {
    const { photo, width, height } = view, [{ photo: image }] = this.panes;
    let lost = "";
    if (photo) {
      for (const pane of this.panes) pane.photo.src = photo;
      try {
        await image.decode();
        if (isTurned(image, width, height)) {
          lost = "The browser shows this photo on its side, though its data say how to turn it: the heatmaps are shown alone.";
        }
      } catch {
        lost = "The photo cannot be shown here: its address has expired, or the browser does not know its format.";
      }
    } else lost = "The photo is not part of these data: the heatmaps are shown alone.";
    if (view !== this.#view) return null;
    this.lost = lost;
    for (const pane of this.panes) {
      pane.photo.hidden = Boolean(lost);
      if (!photo) pane.photo.removeAttribute("src");
      pane.frame.classList.toggle("plain", Boolean(lost));
    }
    if (!lost) return [image.naturalWidth, image.naturalHeight];
    const scale = Math.min(1, 1000 / Math.max(width, height));
    return width > 1 ? [width * scale, height * scale] : [this.#view.columns * 24, this.#view.rows * 24];
  }

  #showOverlays() {
    const pictures = this.#view.classes.filter(({ overlay }) => overlay);
    this.$("problem").textContent = "This job left no array of heatmaps, which can be looked through: its artifacts need "
      + `{"kind": "heatmap"}.${pictures.length ? " These are its overlays." : ""}`;
    this.$("overlays").replaceChildren(...pictures.map((one) => make("figure", {},
      make("figcaption", {}, named(one), make("span", { textContent: percent(one.probability) })),
      make("img", { src: one.overlay, alt: `The overlay of the class ${named(one)}` }))));
  }

  #row(tag, one, properties) {
    const bar = make("div");
    bar.style.setProperty("--share", `${100 * one.probability}%`);
    return make(tag, { ...properties, class: "one" }, make("span", { class: "rank", textContent: `#${one.rank}` }),
      make("span", { class: "name", textContent: named(one) }), make("span", { class: "percent", textContent: percent(one.probability) }),
      make("div", { class: "bar", "aria-hidden": "true" }, bar));
  }

  #list() {
    const { classes, predictions } = this.#view;
    this.$("classes").hidden = classes.length < 2 && predictions.length < 2;
    this.viewer.classList.toggle("alone", this.$("classes").hidden);
    this.$("count").textContent = classes.length > 1 ? `(${classes.length})` : "";
    this.$("tabs").replaceChildren(...classes.map((one, index) => {
      const tab = this.#row("button", one, { type: "button", id: `tab-${index}`, role: "tab", "aria-controls": "panel" });
      tab.addEventListener("click", () => this.#choose(index));
      return tab;
    }));
    const explained = new Set(classes.map(({ id }) => id)), others = predictions.filter(({ id }) => !explained.has(id));
    this.$("others").hidden = !others.length;
    this.$("others-title").textContent = `${others.length} more predicted, not explained`;
    this.$("others-list").replaceChildren(...others.map((one) => this.#row("div", one, {})));
  }

  // Whether the list of classes goes on, below or to the right.
  #fadeList() {
    const list = this.$("list");
    list.classList.toggle("more", list.scrollTop + list.clientHeight < list.scrollHeight - 4
      || list.scrollLeft + list.clientWidth < list.scrollWidth - 4);
  }

  #showTab(tab) {
    const list = this.$("list"), near = (from, size, at, room) => Math.min(Math.max(at, from + size - room + 34), from - 34);
    list.scrollTop = near(tab.offsetTop, tab.offsetHeight, list.scrollTop, list.clientHeight);
    list.scrollLeft = near(tab.offsetLeft, tab.offsetWidth, list.scrollLeft, list.clientWidth);
    this.#fadeList();
  }

  #moveInTabs(event) {
    const last = this.#view.classes.length - 1, chosen = this.#chosen;
    const next = {
      ArrowLeft: chosen ? chosen - 1 : last, ArrowUp: chosen ? chosen - 1 : last,
      ArrowRight: chosen < last ? chosen + 1 : 0, ArrowDown: chosen < last ? chosen + 1 : 0, Home: 0, End: last,
    }[event.key];
    if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#choose(next);
    this.$("tabs").children[next].focus();
  }

  #choose(index, isFirst) {
    this.#chosen = index;
    if (this.#other === index) this.#other = -1;
    [...this.$("tabs").children].forEach((tab, at) => {
      tab.setAttribute("aria-selected", String(at === index));
      tab.tabIndex = at === index ? 0 : -1;
    });
    this.#showTab(this.$("tabs").children[index]);
    this.$("panel").setAttribute("aria-labelledby", `tab-${index}`);
    for (const option of this.$("compare").options) option.disabled = Number(option.value) === index;
    this.#compare(this.#other);
    if (!isFirst) this.#tell("gradcam-choose", { index, class: this.#view.classes[index] });
  }

  // Show a second class beside the first, both in one scale; -1: none.
  #compare(other) {
    if (other >= 0 && this.#other < 0) {
      this.#hadScale = this.$("scale").value;
      this.$("scale").value = "common";
    } else if (other < 0 && this.#other >= 0 && this.#hadScale) this.$("scale").value = this.#hadScale;
    this.#other = other;
    this.$("compare").value = other;
    this.panes[1].figure.hidden = other < 0;
    this.$("panes").classList.toggle("two", other >= 0);
    this.#draw();
    this.#place();
  }

  get #shown() { return this.#other < 0 ? [this.#chosen] : [this.#chosen, this.#other]; }
  get #isCommon() { return this.$("scale").value === "common" && this.#view.classes.length > 1; }

  // By what the values of a class are multiplied in the chosen scale, so that its top is 1.
  #factor(one) {
    if (!one.peak) return 0;
    const strength = ({ rawMax }) => Math.max(rawMax, 0) || 0;
    if (!this.#isCommon) return 1 / one.peak;
    return strength(one) / (Math.max(...this.#view.classes.map(strength)) || 1) / one.peak;
  }

  #fade() {
    const opacity = this.$("opacity").value;
    this.$("opacity-value").textContent = `${opacity} %`;
    this.viewer.style.setProperty("--opacity", opacity / 100);
    if (this.#view) this.#drawLegend();
  }

  #draw() {
    const view = this.#view;
    if (!view?.rows) return;
    const table = tableOf(this.$("colormap").value), isFlat = this.$("cells").checked;
    const threshold = Number(this.$("threshold").value);
    this.$("threshold-value").textContent = threshold ? `${threshold} % of the scale` : "nothing";
    this.#shown.forEach((index, at) => {
      const one = view.classes[index], pane = this.panes[at], factor = this.#factor(one);
      const drawn = `${this.#asked} ${index} ${factor} ${isFlat}`;
      if (pane.drawn !== drawn) {  // else the sliders only colour it again
        pane.drawn = drawn;
        pane.levels = enlarge(one.cells.map((value) => value * factor), view.rows, view.columns, ...this.#drawnSize,
          view.placement, isFlat);
      }
      paint(pane.levels, table, threshold / 100 * 255, pane.canvas);
      pane.canvas.classList.toggle("flat", isFlat);
      pane.name.textContent = named(one);
      pane.share.textContent = percent(one.probability);
      const where = whereStrongest(one.cells, view) || this.#nothing;
      pane.frame.setAttribute("aria-label", `The photo with the heatmap of the class ${named(one)}, ${percent(one.probability)}. ${where}`);
    });
    this.#drawLegend();
    this.#note();
    this.#place();
  }

  // The colours as they are drawn: at this opacity over white, at the top, to black, at the bottom.
  #drawLegend() {
    const canvas = this.$("legend"), { width, height } = canvas, image = new ImageData(width, height);
    const table = tableOf(this.$("colormap").value), alpha = this.$("opacity").value / 100;
    const least = Number(this.$("threshold").value) / 100 * 255;
    for (let y = 0; y < height; y++) {
      const ground = 255 * (1 - y / (height - 1));
      for (let x = 0; x < width; x++) {
        const share = x < least ? 0 : alpha, at = 4 * (y * width + x);
        for (let channel = 0; channel < 3; channel++) {
          image.data[at + channel] = ground * (1 - share) + table[3 * x + channel] * share;
        }
        image.data[at + 3] = 255;
      }
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  get #nothing() {
    const what = { counterfactual: "speaks against this class", eigencam: "stands out" }[this.#view.method.name];
    return `Nothing in the image ${what || "speaks for this class"}.`;
  }

  #note() {
    const view = this.#view, { classes, against } = view, shown = this.#shown.map((index) => classes[index]);
    const [one] = shown, isCommon = this.#isCommon;
    const strongestClass = classes.reduce((most, each) => Math.max(each.rawMax, 0) > Math.max(most.rawMax, 0) ? each : most);
    const top = isCommon ? strongestClass : one;
    const raw = view.isSmoothed || !(top.rawMax > 0) || (!isCommon && shown.length > 1) ? "" : `, raw ${number(top.rawMax)}`;
    const whose = isCommon ? `strongest region of all classes (${named(top)}${raw})`
      : shown.length > 1 ? "strongest region of each class" : `strongest region for ${named(one)}${raw}`;
    this.$("top").textContent = `100 %: ${whose}`;
    const factor = this.#factor(one) * one.peak;
    this.$("peak").hidden = !isCommon || shown.length > 1 || factor >= 1;
    this.$("peak").style.left = `${100 * factor}%`;
    this.$("peak").title = `The peak of ${named(one)}: ${Math.round(100 * factor)} %`;
    this.$("legend").setAttribute("aria-label", `Colours from 0 to the ${whose}, as they look on bright and on dark parts of the photo`);
    this.$("color-note").textContent = COLOR_NOTES[this.$("colormap").value] || "";
    this.$("color-note").hidden = !this.$("color-note").textContent;

    const marks = [], notes = [];
    const say = (text, isMark) => {
      if (text) (isMark ? marks : notes).push(make("p", { class: isMark ? "said mark" : "said", textContent: text }));
    };
    for (const each of shown) {
      if (each.isZero) say(shown.length > 1 ? `${named(each)}: ${this.#nothing}` : this.#nothing, true);
    }
    const low = shown.filter(({ probability }) => probability < LOW_PROBABILITY);
    if (!isCommon && classes.length > 1) {
      const weak = low.length ? ` ${named(low[0])} has only ${percent(low[0].probability)}.` : "";
      say(`Each class has its own scale: its strongest region has full colour, however improbable it is.${weak} `
        + "Colours of two classes cannot be compared.", true);
    } else if (isCommon) {
      const parts = shown.map((each) => `${named(each)} reaches ${Math.round(100 * this.#factor(each) * each.peak)} % of it`);
      marks.push(make("p", { class: "said", textContent: `One scale for all ${classes.length} classes: full colour is the `
        + `strongest region of any of them. ${parts.join("; ")}.` }));
    } else if (low.length) {
      say(`The network gives this class only ${percent(one.probability)}: full colour is its own strongest region nevertheless.`, true);
    }
    for (const warning of view.warnings) if (warning.detail && (warning.class_id ?? -1) < 0) say(warning.detail, true);
    for (const warning of view.warnings) {
      if (warning.detail && shown.some(({ id }) => id === warning.class_id)) say(warning.detail, true);
    }
    say(this.lost, true);
    if (shown.length < 2) say(whereStrongest(one.cells, view));
    const [left, , right] = view.placement, [, above, , below] = view.placement;
    if (left > 0 || above > 0 || right < 1 || below < 1) say("What is not coloured was cut off before the network saw the photo.");
    const counts = { counterfactual: "counts against the class", eigencam: "stands out to the layer, whichever the class" };
    const others = against.length ? `, rather than for ${against.slice(0, 3).map(named).join(" or ")}${against.length > 3 ? ` or ${against.length - 3} others` : ""}` : "";
    say(`The colours show how much each region ${counts[view.method.name] || "counts for the class"}${others}. They tell where the `
      + "network looked, not whether it is right. "
      + (this.$("cells").checked ? "Each cell of the map is drawn as it is." : "Between the cells of the map the colours are interpolated.")
      + " The legend has them as they look over bright parts of the photo, at its top, and over dark ones.");
    for (const each of shown) {
      const facts = Object.entries(each.metrics).map(([name, value]) => [MEANINGS[name]?.[0] || name, value.toFixed(3), MEANINGS[name]?.[1] || ""]);
      if (each.completeness !== null) facts.push(["Sum off by", `${(100 * each.completeness).toFixed(1)} %`, "of the attributions: low is exact"]);
      if (each.rawMax !== undefined) facts.push(["Raw map", `${number(each.rawMin)} to ${number(each.rawMax)}`, "before negative values were cut off and it was scaled"]);
      notes.push(make("dl", { "aria-label": named(each) }, ...(shown.length > 1 ? [make("dt", { textContent: "Class" }), make("dd", { textContent: named(each) })] : []),
        ...facts.flatMap(([name, value, meaning]) => [make("dt", { textContent: name }),
          make("dd", {}, `${value} `, make("span", { textContent: meaning }))])));
    }
    this.$("marks").replaceChildren(...marks);
    this.$("notes").replaceChildren(...notes);
  }

  // ---- zoom and place, the same for photo and heatmap, and for both classes

  zoomBy(step, at = [0.5, 0.5]) {
    const { k, x, y } = this.zoom;
    const wanted = Math.min(Math.max(step ? k * step : 1, 1), MAX_ZOOM), grown = wanted / k;
    this.zoom = { k: wanted, x: at[0] - (at[0] - x) * grown, y: at[1] - (at[1] - y) * grown };
    this.moveBy(0, 0);
  }

  moveBy(right, down) {
    const { k, x, y } = this.zoom, within = (value) => Math.min(Math.max(value, 1 - k), 0);
    this.zoom = { k, x: within(x + right), y: within(y + down) };
    this.#place();
  }

  #place() {
    const view = this.#view;
    if (!view?.rows) return;
    const { k, x, y } = this.zoom;
    const [left, top, right, bottom] = view.placement;
    const box = this.panes[0].frame.getBoundingClientRect();
    const wide = box.width * k * (right - left) / view.columns, high = box.height * k * (bottom - top) / view.rows;
    let path = "";
    if (this.$("cells").checked && Math.min(wide, high) >= MIN_CELL_PX) {
      for (let column = 0; column <= view.columns; column++) {
        const at = left + column / view.columns * (right - left);
        path += `M${at} ${top}V${bottom}`;
      }
      for (let row = 0; row <= view.rows; row++) path += `M${left} ${top + row / view.rows * (bottom - top)}H${right}`;
    }
    const boxes = view.boxes.map(([from, above, to, below]) => `M${from} ${above}H${to}V${below}H${from}Z`).join("");
    for (const { stage, lines, boxes: outlines, frame } of this.panes) {
      stage.style.transform = `translate(${100 * x}%, ${100 * y}%) scale(${k})`;
      frame.classList.toggle("zoomed", k > 1);
      for (const line of [...lines, ...outlines]) {
        line.setAttribute("d", outlines.includes(line) ? boxes : path);
        line.setAttribute("transform", `matrix(${k} 0 0 ${k} ${x} ${y})`);
      }
    }
    this.#fadeList();
    this.$("zoom-out").disabled = this.$("zoom-whole").disabled = k <= 1;
    this.$("zoom-in").disabled = k >= MAX_ZOOM;
    this.#showProbe();
  }

  // ---- the value at a place

  // The pointer has left the picture; what the keys have chosen stays.
  leave() { if (!this.#isByKeys) this.probeAt(null); }

  probeAt(place, isByKeys = false) {
    this.#isByKeys = isByKeys;
    this.#probe = place && place.u >= 0 && place.u <= 1 && place.v >= 0 && place.v <= 1 ? [place.u, place.v] : null;
    this.#showProbe();
  }

  #reading() {
    const view = this.#view, [u, v] = this.#probe, [left, top, right, bottom] = view.placement;
    const column = Math.floor((u - left) / (right - left) * view.columns) + 1;
    const row = Math.floor((v - top) / (bottom - top) * view.rows) + 1;
    const values = this.#shown.map((index) => {
      const one = view.classes[index], value = valueAt(one.cells, view, u, v, this.$("cells").checked);
      if (value === undefined) return null;
      const raw = view.isSmoothed || !(one.rawMax > 0) || !one.peak ? "" : `raw ${number(value / one.peak * one.rawMax)}`;
      return { text: `${Math.round(100 * value * this.#factor(one))} %`, raw };
    });
    if (values.includes(null)) return ["not seen by the network", ""];
    const wide = Math.max(view.width, 1), where = view.width > 1 ? `x ${Math.floor(u * wide)}, y ${Math.floor(v * view.height)}, ` : "";
    return [values.map(({ text }) => text).join(" and "), [...values.map(({ raw }) => raw).filter(Boolean), `${where}cell ${column}, ${row}`].join(" \u00b7 ")];
  }

  #showProbe() {
    const { k, x, y } = this.zoom, value = this.$("value");
    for (const { probe } of this.panes) {
      probe.hidden = !this.#probe;
      if (!this.#probe) continue;
      probe.style.left = `${100 * (x + this.#probe[0] * k)}%`;
      probe.style.top = `${100 * (y + this.#probe[1] * k)}%`;
    }
    if (!this.#probe || !this.#view) return value.replaceChildren("Point at the photo to read a value.");
    const [share, rest] = this.#reading();
    value.replaceChildren(make("b", { textContent: share }), rest ? ` \u00b7 ${rest}` : "");
  }

  // Keys on the picture: the map is read cell by cell.
  press(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const view = this.#view, [left, top, right, bottom] = view.placement;
    const step = [(right - left) / view.columns, (bottom - top) / view.rows];
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const zoom = { "+": 1.6, "=": 1.6, "-": 1 / 1.6, "0": 0 }[event.key];
    if (!way && zoom === undefined && event.key !== "Escape") return;
    event.preventDefault();
    const { k, x, y } = this.zoom;
    if (zoom !== undefined) {
      return this.zoomBy(zoom, this.#probe ? [x + this.#probe[0] * k, y + this.#probe[1] * k] : undefined);
    }
    if (!way) return this.probeAt(null);
    const cell = this.#probe
      ? [Math.floor((this.#probe[0] - left) / step[0]) + way[0], Math.floor((this.#probe[1] - top) / step[1]) + way[1]]
      : [Math.floor(view.columns / 2), Math.floor(view.rows / 2)];
    const within = (at, from, size) => Math.min(Math.max(from + (at + 0.5) * size, Math.max(from, 0) + size / 2), Math.min(from + size * 1e6, 1) - 1e-6);
    const u = Math.min(within(cell[0], left, step[0]), Math.min(right, 1) - Math.min(step[0] / 2, 0.5));
    const v = Math.min(within(cell[1], top, step[1]), Math.min(bottom, 1) - Math.min(step[1] / 2, 0.5));
    this.probeAt({ u, v }, true);
    const at = [x + u * k, y + v * k];  // kept in sight
    this.moveBy(...at.map((one) => one < 0.05 ? 0.3 - one : one > 0.95 ? 0.7 - one : 0));
    this.$("told").textContent = this.#reading().filter(Boolean).join(", ");
  }
}

const decoded = new Map();
function tableOf(name) {
  const known = Object.hasOwn(TABLES, name) ? name : DEFAULT_COLORMAP;
  if (!decoded.has(known)) decoded.set(known, bytes(TABLES[known]));
  return decoded.get(known);
}

// For pages that draw many small pictures, such as the gallery.
Object.assign(GradcamViewer, { colormaps: Object.keys(TABLES), DEFAULT_COLORMAP, DEFAULT_OPACITY, decodeCells, enlarge, paint, tableOf });
if (!customElements.get("gradcam-viewer")) customElements.define("gradcam-viewer", GradcamViewer);
})();

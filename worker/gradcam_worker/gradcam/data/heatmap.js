// How a page draws a heatmap as the engine does, from its cells.

// Where each pixel lies between two cells, whose values are held in their middles. The cells lie from one share
// of the pixels to another; of a pixel that is not on them there is nothing.
function between(pixels, cells, from, to) {
  return Array.from({ length: pixels }, (_, pixel) => {
    const share = ((pixel + 0.5) / pixels - from) / (to - from);
    if (share < 0 || share >= 1) return undefined;
    const place = Math.min(Math.max(share * cells - 0.5, 0), cells - 1);
    const first = Math.floor(place);
    return [first, Math.min(first + 1, cells - 1), place - first];
  });
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
function enlarge(cells, rows, columns, width, height, placement = [0, 0, 1, 1]) {
  const [left, top, right, bottom] = placement;
  const across = between(width, columns, left, right);
  const wide = new Float32Array(rows * width).fill(-1);
  for (let row = 0; row < rows; row++) {
    const from = row * columns;
    across.forEach((seen, x) => {
      if (!seen) return;
      const [first, second, share] = seen;
      wide[row * width + x] = cells[from + first] * (1 - share) + cells[from + second] * share;
    });
  }
  const large = new Float32Array(width * height).fill(-1);
  let peak = 0;
  between(height, rows, top, bottom).forEach((seen, y) => {
    if (!seen) return;
    const [above, below, share] = seen;
    for (let x = 0; x < width; x++) {
      const value = wide[above * width + x] * (1 - share) + wide[below * width + x] * share;
      large[y * width + x] = value;
      if (value > peak) peak = value;
    }
  });
  const most = strongest(cells, rows, columns, placement);
  const scale = peak > 0 ? 255 * Math.max(most / peak, 1) : 0;
  const rounded = new Uint8ClampedArray(1);  // a clamped array rounds what is put into it
  return Int16Array.from(large, (value) => {
    if (value < 0) return -1;
    rounded[0] = value * scale;
    return rounded[0];
  });
}

// Levels in the colours of a table (256 x RGB); those below `least`, and those below 0, stay clear.
function color(levels, table, least, canvas) {
  const image = new ImageData(canvas.width, canvas.height);
  const { data: pixels } = image;
  for (let pixel = 0; pixel < levels.length; pixel++) {
    const level = levels[pixel];
    if (level < least) continue;
    pixels[4 * pixel] = table[3 * level];
    pixels[4 * pixel + 1] = table[3 * level + 1];
    pixels[4 * pixel + 2] = table[3 * level + 2];
    pixels[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

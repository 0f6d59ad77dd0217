// How a page draws a heatmap as the engine does, from its cells.

// Where each pixel lies between two cells, whose values are held in their middles.
function between(pixels, cells) {
  return Array.from({ length: pixels }, (_, pixel) => {
    const place = Math.min(Math.max((pixel + 0.5) * cells / pixels - 0.5, 0), cells - 1);
    const first = Math.floor(place);
    return [first, Math.min(first + 1, cells - 1), place - first];
  });
}

// Cells (rows x columns) -> levels (0 to 255), one for each pixel: bilinear, the peak kept as it was.
function enlarge(cells, rows, columns, width, height) {
  const across = between(width, columns);
  const wide = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    across.forEach(([left, right, share], x) => {
      const from = row * columns;
      wide[row * width + x] = cells[from + left] * (1 - share) + cells[from + right] * share;
    });
  }
  const large = new Float32Array(width * height);
  let peak = 0;
  between(height, rows).forEach(([above, below, share], y) => {
    for (let x = 0; x < width; x++) {
      const value = wide[above * width + x] * (1 - share) + wide[below * width + x] * share;
      large[y * width + x] = value;
      if (value > peak) peak = value;
    }
  });
  const scale = peak > 0 ? 255 * cells.reduce((most, cell) => Math.max(most, cell), 0) / peak : 0;
  const rounded = new Uint8ClampedArray(large.length);  // a clamped array rounds what is put into it
  for (let pixel = 0; pixel < large.length; pixel++) rounded[pixel] = large[pixel] * scale;
  return rounded;
}

// Levels in the colours of a table (256 x RGB); those below `least` stay clear.
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

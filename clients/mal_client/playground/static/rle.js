// Decodes COCO's compressed run lengths into pixels to draw. Files get the masks as the server encoded them.

/** Returns the run lengths of a compressed string: background and mask alternate, in column order. */
export function runLengths(counts) {
  const runs = [];
  let index = 0;
  while (index < counts.length) {
    let value = 0;
    let factor = 1;
    let digit;
    do {
      digit = counts.charCodeAt(index++) - 48;
      value += (digit & 0x1f) * factor;
      factor *= 32;
    } while (digit & 0x20);
    // Extends the sign bit of the last digit.
    if (digit & 0x10) value -= factor;
    // From the fourth run on, the value is the difference from the run two before.
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** Returns the mask inside its tight box, in row order: {x, y, width, height, bits: Uint8Array}; null if it is empty. */
export function maskRegion(rle, maskBox) {
  if (maskBox === null) return null;
  const [x, y, width, height] = maskBox;
  const rows = rle.size[0];
  const bits = new Uint8Array(width * height);
  let position = 0;
  runLengths(rle.counts).forEach((run, index) => {
    if (index % 2) {
      for (let pixel = position; pixel < position + run; pixel++) {
        bits[((pixel % rows) - y) * width + Math.floor(pixel / rows) - x] = 1;
      }
    }
    position += run;
  });
  return { x, y, width, height, bits };
}

const MAX_LAYER_PIXELS = 8_000_000;
const FILL_ALPHA = 105;

/** Returns a canvas with the mask in a color [r, g, b], with an opaque edge, and its position; huge masks lose detail. */
export function maskLayer(region, color) {
  const step = Math.ceil(Math.sqrt((region.width * region.height) / MAX_LAYER_PIXELS));
  const width = Math.ceil(region.width / step);
  const height = Math.ceil(region.height / step);
  const isMask = (column, row) =>
    column >= 0 && row >= 0 && column < width && row < height && region.bits[row * step * region.width + column * step];
  const pixels = new ImageData(width, height);
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      if (!isMask(column, row)) continue;
      const isInner =
        isMask(column - 1, row) && isMask(column + 1, row) && isMask(column, row - 1) && isMask(column, row + 1);
      pixels.data.set([...color, isInner ? FILL_ALPHA : 255], 4 * (row * width + column));
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return { canvas, x: region.x, y: region.y, width: width * step, height: height * step };
}

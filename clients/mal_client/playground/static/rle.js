// COCO's compressed run lengths → pixels to draw. Decodes only: masks go back into files as the server wrote them.

/** Run lengths of a compressed string: background and mask in turn, down the columns. */
export function runLengths(counts) {
  const runs = [];
  let at = 0;
  while (at < counts.length) {
    let value = 0;
    let factor = 1;
    let digit;
    do {
      digit = counts.charCodeAt(at++) - 48;
      value += (digit & 0x1f) * factor;
      factor *= 32;
    } while (digit & 0x20);
    // The sign bit of the last digit extends upwards.
    if (digit & 0x10) value -= factor;
    // From the fourth on, a run is the difference to the run two before.
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** The mask inside its tight box, row by row: {x, y, width, height, bits: Uint8Array}; null for an empty mask. */
export function maskRegion(rle, maskBox) {
  if (maskBox === null) return null;
  const [x, y, width, height] = maskBox;
  const rows = rle.size[0];
  const bits = new Uint8Array(width * height);
  let position = 0;
  runLengths(rle.counts).forEach((run, index) => {
    if (index % 2) {
      for (let at = position; at < position + run; at++) {
        bits[((at % rows) - y) * width + Math.floor(at / rows) - x] = 1;
      }
    }
    position += run;
  });
  return { x, y, width, height, bits };
}

const LARGEST_LAYER = 8_000_000;
const TINT = 105;

/** A canvas with the mask in a color [r, g, b], its rim opaque, and where to draw it; masks that are huge lose detail. */
export function maskLayer(region, color) {
  const step = Math.ceil(Math.sqrt((region.width * region.height) / LARGEST_LAYER));
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
      pixels.data.set([...color, isInner ? TINT : 255], 4 * (row * width + column));
    }
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return { canvas, x: region.x, y: region.y, width: width * step, height: height * step };
}

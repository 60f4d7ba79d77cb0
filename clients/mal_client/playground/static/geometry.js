// Boxes as [x, y, width, height] in px of the stored image. Pure functions.

export const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];

/** Returns the box between two corners, rounded to pixels and clipped to the image; null if nothing is left. */
export function boxBetween(a, b, image) {
  const clampX = (x) => Math.min(Math.max(Math.round(x), 0), image.width);
  const clampY = (y) => Math.min(Math.max(Math.round(y), 0), image.height);
  const [x0, x1] = [clampX(Math.min(a.x, b.x)), clampX(Math.max(a.x, b.x))];
  const [y0, y1] = [clampY(Math.min(a.y, b.y)), clampY(Math.max(a.y, b.y))];
  return x1 > x0 && y1 > y0 ? [x0, y0, x1 - x0, y1 - y0] : null;
}

/** Returns the box moved by (dx, dy), kept inside the image. */
export function moved([x, y, w, h], dx, dy, image) {
  const within = (value, limit) => Math.min(Math.max(value, Math.min(0, limit)), Math.max(0, limit));
  return [within(x + Math.round(dx), image.width - w), within(y + Math.round(dy), image.height - h), w, h];
}

/** Returns the box with the side or corner `handle` ("nw", "e", …) moved to a point; at least 1 px wide and high. */
export function resized([x, y, w, h], handle, point, image) {
  let [x0, y0, x1, y1] = [x, y, x + w, y + h];
  const px = Math.min(Math.max(Math.round(point.x), 0), image.width);
  const py = Math.min(Math.max(Math.round(point.y), 0), image.height);
  if (handle.includes("w")) x0 = Math.min(px, x1 - 1);
  if (handle.includes("e")) x1 = Math.max(px, x0 + 1);
  if (handle.includes("n")) y0 = Math.min(py, y1 - 1);
  if (handle.includes("s")) y1 = Math.max(py, y0 + 1);
  return [x0, y0, x1 - x0, y1 - y0];
}

/** Returns the position of a handle of the box. */
export function handlePoint([x, y, w, h], handle) {
  const fraction = (low, high) => (handle.includes(low) ? 0 : handle.includes(high) ? 1 : 0.5);
  return { x: x + w * fraction("w", "e"), y: y + h * fraction("n", "s") };
}

export function contains([x, y, w, h], point) {
  return point.x >= x && point.x < x + w && point.y >= y && point.y < y + h;
}

/**
 * Returns points [x, y, label] with one in the middle of the pixel at a place, where it replaces one of the other label;
 * the same list if it has that point.
 */
export function withPoint(points, { x, y }, label) {
  const added = [Math.floor(x) + 0.5, Math.floor(y) + 0.5, label];
  const there = points.find((point) => point[0] === added[0] && point[1] === added[1]);
  return there?.[2] === label ? points : [...points.filter((point) => point !== there), added];
}

export function sameBox(a, b) {
  return a.every((value, index) => value === b[index]);
}

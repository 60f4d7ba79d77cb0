// Draws the current image, its masks and boxes on a canvas; converts between canvas and image coordinates.

import { HANDLES, handlePoint } from "./geometry.js";

const MARGIN = 16;
const MAX_SCALE = 64;
const PREVIEW_SIDE = 4096;
/** Scale from which pixels are drawn as squares. */
const SQUARES_FROM = 3;

export class Stage {
  #session;
  #canvas;
  #context;
  #size = { width: 0, height: 0 };
  #isScheduled = false;
  /** The box that the user is drawing; set by the gestures. */
  draft = null;

  constructor(session, canvas) {
    this.#session = session;
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    new ResizeObserver(() => this.#resized()).observe(canvas);
    session.addEventListener("change", () => this.redraw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }

  /** {scale, x, y}: CSS px per image px, and the position of the image's top left corner on the canvas. */
  get view() {
    const image = this.#session.current;
    return image === null ? null : (image.view ??= this.#fitted(image));
  }

  toImage(point) {
    const { scale, x, y } = this.view;
    return { x: (point.x - x) / scale, y: (point.y - y) / scale };
  }

  toCanvas(point) {
    const { scale, x, y } = this.view;
    return { x: point.x * scale + x, y: point.y * scale + y };
  }

  fit() {
    Object.assign(this.#session.current, { view: null, isFitted: true });
    this.#session.changed();
  }

  /** Zooms to a scale and keeps the image fixed at `point` of the canvas, by default its center. */
  zoomTo(scale, point = { x: this.#size.width / 2, y: this.#size.height / 2 }) {
    const smallest = Math.min(1, this.#fitted(this.#session.current).scale) / 4;
    const clamped = Math.min(Math.max(scale, smallest), MAX_SCALE);
    const { x, y } = this.toImage(point);
    this.#show({ scale: clamped, x: point.x - x * clamped, y: point.y - y * clamped });
  }

  zoomBy(factor, point) {
    this.zoomTo(this.view.scale * factor, point);
  }

  panBy(dx, dy) {
    const { scale, x, y } = this.view;
    this.#show({ scale, x: x + dx, y: y + dy });
  }

  /** Returns the visible part of the image, as two corners. */
  visible() {
    const { current } = this.#session;
    const [a, b] = [this.toImage({ x: 0, y: 0 }), this.toImage({ x: this.#size.width, y: this.#size.height })];
    return [
      { x: Math.max(a.x, 0), y: Math.max(a.y, 0) },
      { x: Math.min(b.x, current.width), y: Math.min(b.y, current.height) },
    ];
  }

  /** Centers the view on a box that is not visible. */
  reveal([x, y, w, h]) {
    const [a, b] = this.visible();
    if (x < b.x && x + w > a.x && y < b.y && y + h > a.y) return;
    const middle = this.toCanvas({ x: x + w / 2, y: y + h / 2 });
    this.panBy(this.#size.width / 2 - middle.x, this.#size.height / 2 - middle.y);
  }

  redraw() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => {
      this.#isScheduled = false;
      this.#draw();
    });
  }

  #show({ scale, x, y }) {
    const image = this.#session.current;
    // At least 40 px of the image stay visible.
    const clamp = (low, available, extent) => Math.min(Math.max(low, 40 - extent), available - 40);
    image.isFitted = false;
    image.view = {
      scale,
      x: clamp(x, this.#size.width, image.width * scale),
      y: clamp(y, this.#size.height, image.height * scale),
    };
    this.#session.changed();
  }

  #fitted(image) {
    const available = { width: this.#size.width - 2 * MARGIN, height: this.#size.height - 2 * MARGIN };
    // Small images are enlarged by an integer factor, so that their pixels are squares of equal size.
    const exact = Math.max(0.001, Math.min(available.width / image.width, available.height / image.height));
    const scale = exact >= SQUARES_FROM ? Math.min(Math.floor(exact), 8) : exact;
    return {
      scale,
      x: (this.#size.width - image.width * scale) / 2,
      y: (this.#size.height - image.height * scale) / 2,
    };
  }

  #resized() {
    const { width, height } = this.#canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    this.#size = { width, height };
    this.#canvas.width = Math.max(1, Math.round(width * ratio));
    this.#canvas.height = Math.max(1, Math.round(height * ratio));
    // A view that the user chose stays; a fitted view is fitted again.
    this.#session.images.filter((image) => image.isFitted).forEach((image) => (image.view = null));
    // Immediately, because a resized canvas is blank.
    this.#draw();
  }

  #draw() {
    const context = this.#context;
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    const image = this.#session.current;
    if (image === null) return;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const { scale, x, y } = this.view;
    // Aligned to device pixels, so that an image at 100 % is drawn pixel by pixel.
    const corner = { x: Math.round(x * ratio) / ratio, y: Math.round(y * ratio) / ratio };
    context.imageSmoothingEnabled = scale * ratio < SQUARES_FROM && !Number.isInteger(scale * ratio);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#source(image, scale * ratio), corner.x, corner.y, image.width * scale, image.height * scale);
    if (this.#session.showMasks) this.#drawMasks(image, corner, scale);
    if (this.#session.showBoxes) this.#drawBoxes(image, corner, scale);
    if (this.draft !== null) this.#drawRect(this.draft, corner, scale, "#fff", { isDashed: true });
  }

  /** Returns the bitmap, or a smaller copy of a large one if it is drawn at a small scale. */
  #source(image, scale) {
    const shrink = PREVIEW_SIDE / Math.max(image.width, image.height);
    if (shrink >= 1 || scale > shrink) return image.bitmap;
    if (image.preview === undefined) {
      image.preview = null;
      const size = { resizeWidth: Math.max(1, Math.round(image.width * shrink)), resizeQuality: "medium" };
      createImageBitmap(image.bitmap, size).then(
        (bitmap) => {
          image.preview = bitmap;
          this.redraw();
        },
        // Without memory for a copy, the bitmap itself is drawn, more slowly.
        () => {},
      );
    }
    return image.preview ?? image.bitmap;
  }

  #drawMasks(image, corner, scale) {
    const context = this.#context;
    for (const box of image.boxes) {
      const state = this.#session.state(image, box);
      // A failed box has no mask; its previous mask belongs to other values.
      if (!box.layer || state === "failed") continue;
      const { canvas, x, y, width, height } = box.layer;
      context.globalAlpha = state === "labeled" ? 1 : 0.4;
      context.drawImage(canvas, corner.x + x * scale, corner.y + y * scale, width * scale, height * scale);
    }
    context.globalAlpha = 1;
  }

  #drawBoxes(image, corner, scale) {
    image.boxes.forEach((box, index) => {
      const isSelected = box.id === image.selected;
      const color = `rgb(${box.color.join(" ")})`;
      const isDashed = this.#session.state(image, box) !== "labeled";
      this.#drawRect(box.rect, corner, scale, color, { isDashed, isThick: isSelected });
      const tight = this.#session.tightBoxes && !isDashed ? box.result.mask_box : null;
      if (tight) this.#drawRect(tight, corner, scale, color, { isDotted: true });
      this.#drawNumber(String(index + 1), box, corner, scale, color);
      if (isSelected) this.#drawHandles(box.rect, corner, scale);
    });
    for (const box of image.boxes) this.#drawPoints(box, corner, scale, box.id === image.selected ? 7 : 5);
  }

  #drawRect([x, y, w, h], corner, scale, color, { isDashed = false, isDotted = false, isThick = false } = {}) {
    const context = this.#context;
    const rect = [corner.x + x * scale, corner.y + y * scale, w * scale, h * scale];
    context.lineWidth = isThick ? 5 : 3.5;
    context.setLineDash([]);
    context.strokeStyle = "rgb(0 0 0 / .65)";
    context.strokeRect(...rect);
    context.lineWidth = isThick ? 2.5 : 1.5;
    context.setLineDash(isDashed ? [6, 4] : isDotted ? [2, 3] : []);
    context.strokeStyle = color;
    context.strokeRect(...rect);
    context.setLineDash([]);
  }

  #drawNumber(text, box, corner, scale, color) {
    const context = this.#context;
    const [x, y] = [corner.x + box.rect[0] * scale, corner.y + box.rect[1] * scale];
    context.font = "600 12px system-ui, sans-serif";
    const width = context.measureText(text).width + 8;
    // Above the box, or inside it at the top of the canvas.
    const top = y >= 18 ? y - 18 : y;
    context.fillStyle = "rgb(0 0 0 / .8)";
    context.fillRect(x - 1, top, width + 4, 18);
    context.fillStyle = color;
    context.fillRect(x - 1, top, 4, 18);
    context.fillStyle = "#fff";
    context.fillText(text, x + 7, top + 13);
  }

  /** Draws points as green and red dots with a sign, in a white ring with a dark edge. */
  #drawPoints(box, corner, scale, radius) {
    const context = this.#context;
    for (const [pointX, pointY, label] of box.points) {
      const [x, y] = [corner.x + pointX * scale, corner.y + pointY * scale];
      for (const [color, extra] of [["#000", 2.5], ["#fff", 1.5], [label ? "#0a7d32" : "#c41c1c", 0]]) {
        context.fillStyle = color;
        context.beginPath();
        context.arc(x, y, radius + extra, 0, 2 * Math.PI);
        context.fill();
      }
      const arm = radius - 3;
      context.fillStyle = "#fff";
      context.fillRect(x - arm, y - 1, 2 * arm, 2);
      if (label) context.fillRect(x - 1, y - arm, 2, 2 * arm);
    }
  }

  #drawHandles(rect, corner, scale) {
    const context = this.#context;
    for (const name of HANDLES) {
      const { x, y } = handlePoint(rect, name);
      const [left, top] = [corner.x + x * scale - 4, corner.y + y * scale - 4];
      context.fillStyle = "#000";
      context.fillRect(left - 1, top - 1, 10, 10);
      context.fillStyle = "#fff";
      context.fillRect(left, top, 8, 8);
    }
  }
}

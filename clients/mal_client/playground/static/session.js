// The state of the page: images, boxes, their masks, and the undo history. Draws nothing.

import * as api from "./api.js";
import { contains, sameBox, withPoint } from "./geometry.js";
import { maskLayer, maskRegion } from "./rle.js";

/** Colors that color-blind users can distinguish too (Okabe and Ito). */
export const PALETTE = [
  [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167],
];

const MAX_RESULTS = 2000;
const UNDO_STEPS = 200;
const MIN_RETRY_MS = 2000;
const MAX_RETRY_MS = 8000;

export class Session extends EventTarget {
  server = null;
  images = [];
  current = null;
  options = { model: null, branch: null, flip: false, agreement: false };
  category = "object";
  showMasks = true;
  showBoxes = true;
  /** Draws the tight boxes of the masks, and writes them to the file. */
  tightBoxes = false;
  worstFirst = false;
  /** Label of the points that clicks add: 1 for the object, 0 for the background. */
  pointLabel = 1;
  #results = new Map();
  #calls = [];
  #nextBox = 1;
  #saved = "";
  #retryTimer = null;
  #retryMs = MIN_RETRY_MS;

  changed() {
    this.dispatchEvent(new Event("change"));
  }

  notice(text, { info = false, action = null } = {}) {
    this.dispatchEvent(new CustomEvent("notice", { detail: { text, info, action } }));
  }

  // --- the server and the images ---

  async connect() {
    try {
      this.server = await api.server(this.options.model);
      this.#dropUnsupported();
    } catch (error) {
      this.server = null;
      this.notice(error.message, { action: ["Try again", () => this.connect()] });
    }
    this.changed();
    return this.server !== null;
  }

  /** Resets options that the current model does not support. */
  #dropUnsupported() {
    const { branches, can_agree: canAgree } = this.server;
    const isBranchSupported = this.options.branch === null || branches.includes(this.options.branch);
    if (isBranchSupported && (canAgree || !this.options.agreement)) return;
    if (!isBranchSupported) this.options.branch = null;
    this.options.agreement &&= canAgree;
    this.images.forEach((image) => this.#relabelSoon(image, 0));
  }

  async open(files) {
    for (const file of files) {
      try {
        await this.#openOne(file);
      } catch (error) {
        this.notice(`${file.name}: ${error.message.replace(/^image: /, "")}`, {
          action: error.code === "UNAVAILABLE" ? ["Try again", () => this.open([file])] : null,
        });
      }
    }
  }

  async #openOne(file) {
    const maxBytes = this.server?.limits.max_image_bytes;
    if (maxBytes && file.size > maxBytes) {
      throw new api.ApiError(`${file.size} bytes; the server accepts at most ${maxBytes}; compress or resize it`);
    }
    const stored = await api.sendImage(file);
    const image = {
      name: file.name, blob: file, sha256: stored.sha256, width: stored.width, height: stored.height,
      browserCanDecode: stored.browser_can_decode, threshold: null, boxes: [], selected: null, view: null, isFitted: true, bitmap: null,
      undo: [], redo: [], tag: null, timer: 0,
    };
    image.bitmap = await this.#pixels(image);
    this.images.push(image);
    if (stored.orientation !== 1) {
      this.notice(
        `${file.name}: shown without its EXIF orientation, because boxes and masks refer to the stored pixels`,
        { info: true },
      );
    }
    if (stored.frames > 1) this.notice(`${file.name}: has ${stored.frames} frames; only the first is used`, { info: true });
    this.select(image);
  }

  /** Returns the stored pixels; the browser decodes upright JPEG files, the server everything else. */
  async #pixels(image) {
    if (image.browserCanDecode) {
      try {
        const bitmap = await createImageBitmap(image.blob);
        if (bitmap.width === image.width && bitmap.height === image.height) return bitmap;
      } catch {
        // The browser cannot decode this file; the server decodes it or returns an error.
      }
    }
    return createImageBitmap(await this.#withImage(image, () => api.pixels(image.sha256)));
  }

  /** Runs a call for a stored image; sends the image again if the playground has evicted it. */
  async #withImage(image, call) {
    try {
      return await call();
    } catch (error) {
      if (error.reason !== "IMAGE_UNKNOWN") throw error;
      await api.sendImage(image.blob);
      return call();
    }
  }

  select(image) {
    this.current = image;
    this.changed();
  }

  close(image) {
    const index = this.images.indexOf(image);
    this.images.splice(index, 1);
    image.bitmap.close();
    this.#abortUnneeded();
    this.select(this.images[Math.min(index, this.images.length - 1)] ?? null);
  }

  // --- boxes ---

  get selectedBox() {
    return this.current?.boxes.find((box) => box.id === this.current.selected) ?? null;
  }

  selectBox(id) {
    if (this.current === null || this.current.selected === id) return;
    this.current.selected = id;
    this.changed();
  }

  addBox(rect) {
    this.remember();
    const number = this.#nextBox++;
    const color = PALETTE[(number - 1) % PALETTE.length];
    const box = { id: `b${number}`, number: 0, color, rect, category: this.category, threshold: null, points: [] };
    this.current.boxes.push(box);
    this.current.selected = box.id;
    this.#afterEdit();
    return box;
  }

  removeBox(box) {
    this.remember();
    const { boxes } = this.current;
    const index = boxes.indexOf(box);
    boxes.splice(index, 1);
    this.current.selected = boxes[Math.min(index, boxes.length - 1)]?.id ?? null;
    this.#afterEdit();
  }

  /** Limit of points of one box; 0 if the server ignores points. */
  get maxPoints() {
    return this.server?.limits.max_points ?? 0;
  }

  /** Adds a point, [x, y, label] with the label 1 or 0, to a box. */
  addPoint(box, point, label) {
    const points = withPoint(box.points, point, label);
    if (points.length <= this.maxPoints) this.edit(box, "points", points);
    else this.notice(`A box has at most ${this.maxPoints} points.`, { info: true });
  }

  /** Changes a field of a box: "rect", "category", "threshold" or "points". Consecutive edits with the same `tag` are one undo step. */
  edit(box, field, value, { tag = null, delay = 0 } = {}) {
    if (field === "rect" ? sameBox(box.rect, value) : box[field] === value) return;
    this.remember(tag);
    box[field] = value;
    if (field === "rect") this.#removePointsOutside(box);
    this.#afterEdit(delay);
  }

  /** Removes the points of the object that a box has left, because no mask of it can contain them. */
  #removePointsOutside(box) {
    const kept = box.points.filter(([x, y, label]) => label === 0 || contains(box.rect, { x, y }));
    const removed = box.points.length - kept.length;
    if (removed === 0) return;
    box.points = kept;
    const points = removed === 1 ? "1 point of the object is" : `${removed} points of the object are`;
    this.notice(`${points} outside the changed box and removed; Undo restores box and points.`, { info: true });
  }

  /** Shows a box while the user drags it, without labeling it and without an undo step. */
  drag(box, rect) {
    box.rect = rect;
    this.changed();
  }

  dropped(box, before) {
    const after = box.rect;
    box.rect = before;
    this.edit(box, "rect", after);
    this.changed();
  }

  setThreshold(value) {
    this.current.threshold = value;
    this.#afterEdit(150);
  }

  async setOption(name, value) {
    this.options[name] = value;
    // Before labeling, so that no box fails for an option that only the old model supports.
    if (name === "model") await this.connect();
    this.images.forEach((image) => this.#relabelSoon(image, 0));
    this.changed();
  }

  #afterEdit(delay = 0) {
    this.#relabelSoon(this.current, delay);
    this.changed();
  }

  // --- undo ---

  remember(tag = null) {
    const image = this.current;
    if (tag !== null && image.tag === tag) return;
    image.tag = tag;
    image.undo.push(snapshot(image));
    if (image.undo.length > UNDO_STEPS) image.undo.shift();
    image.redo = [];
  }

  undo() {
    this.#step(this.current?.undo, this.current?.redo);
  }

  redo() {
    this.#step(this.current?.redo, this.current?.undo);
  }

  #step(from, to) {
    if (!from?.length) return;
    const image = this.current;
    to.push(snapshot(image));
    const { boxes, selected } = from.pop();
    image.boxes = boxes.map((box) => ({ ...image.boxes.find((now) => now.id === box.id), ...box }));
    image.selected = selected;
    image.tag = null;
    this.#afterEdit();
  }

  // --- masks ---

  /** Returns a key of all inputs of a result; equal keys have equal results. */
  #key(image, box) {
    const { model, branch, flip, agreement } = this.options;
    const threshold = box.threshold ?? image.threshold;
    return JSON.stringify([image.sha256, box.rect, box.points, model, branch, flip, agreement, threshold]);
  }

  /** Returns "labeled", "failed" or "waiting"; a waiting box still shows its previous mask. */
  state(image, box) {
    const key = this.#key(image, box);
    if (box.result && box.resultKey === key) return "labeled";
    return box.errorKey === key ? "failed" : "waiting";
  }

  #relabelSoon(image, delay) {
    clearTimeout(image.timer);
    image.timer = setTimeout(() => this.#relabel(image), delay);
  }

  /** Labels all failed boxes again. */
  retry() {
    for (const image of this.images) {
      image.boxes.forEach((box) => (box.errorKey = null));
      this.#relabelSoon(image, 0);
    }
    this.changed();
  }

  /** Schedules another attempt for boxes that failed because the server is unavailable, with exponential backoff. */
  #scheduleRetry() {
    this.#retryTimer ??= setTimeout(() => {
      this.#retryTimer = null;
      this.#retryMs = Math.min(2 * this.#retryMs, MAX_RETRY_MS);
      this.images.forEach((image) => this.#relabel(image, { isRetry: true }));
    }, this.#retryMs);
  }

  #relabel(image, { isRetry = false } = {}) {
    const pending = [];
    for (const box of image.boxes) {
      const key = this.#key(image, box);
      const isFailed = box.errorKey === key && !(isRetry && box.error.code === "UNAVAILABLE");
      if ((box.result && box.resultKey === key) || isFailed) continue;
      if (this.#results.has(key)) {
        setResult(box, key, this.#results.get(key));
      } else if (!this.#calls.some((call) => call.image === image && call.keys.get(box.id) === key)) {
        pending.push([box, key]);
      }
    }
    this.#abortUnneeded();
    if (pending.length) this.#call(image, pending);
    this.changed();
  }

  /** Aborts the calls whose results are no longer needed. */
  #abortUnneeded() {
    // A call without open boxes is about to end.
    for (const call of this.#calls.filter(({ keys }) => keys.size)) {
      const isNeeded = [...call.keys].some(([id, key]) => {
        const box = this.images.includes(call.image) && call.image.boxes.find((candidate) => candidate.id === id);
        return box && this.#key(call.image, box) === key;
      });
      if (!isNeeded) call.controller.abort();
    }
  }

  async #call(image, pending) {
    // keys: the boxes without a line yet, by id.
    const call = { image, keys: new Map(pending.map(([box, key]) => [box.id, key])), controller: new AbortController() };
    this.#calls.push(call);
    const boxes = pending.map(([{ id, rect, threshold, points }]) => ({ id, box: rect, threshold, points }));
    const options = { ...this.options, threshold: image.threshold };
    const onLine = (line) => this.#onLine(call, line.id, line);
    try {
      await this.#withImage(image, () => api.label(image.sha256, boxes, options, call.controller.signal, onLine));
    } catch (failure) {
      if (failure.name !== "AbortError") {
        const error = { code: failure.code ?? "INTERNAL", reason: failure.reason ?? "", message: failure.message };
        for (const id of [...call.keys.keys()]) this.#onLine(call, id, { id, error });
      }
    } finally {
      this.#calls.splice(this.#calls.indexOf(call), 1);
      this.changed();
    }
  }

  #onLine(call, id, line) {
    const key = call.keys.get(id);
    call.keys.delete(id);
    const box = call.image.boxes.find((candidate) => candidate.id === id);
    const isNeeded = box !== undefined && this.#key(call.image, box) === key;
    if (line.error) {
      if (isNeeded) Object.assign(box, { error: line.error, errorKey: key });
      if (isNeeded && line.error.code === "UNAVAILABLE") this.#scheduleRetry();
    } else {
      this.#retryMs = MIN_RETRY_MS;
      if (this.server === null) this.connect();
      this.#results.set(key, line);
      if (this.#results.size > MAX_RESULTS) this.#results.delete(this.#results.keys().next().value);
      if (isNeeded) setResult(box, key, line);
      this.#checkModel(line.model);
    }
    this.changed();
  }

  #checkModel(model) {
    const known = this.server?.model;
    if (known?.name !== model.name || known.checkpoint_sha256 === model.checkpoint_sha256) return;
    this.server.model = { ...this.server.model, ...model };
    this.notice("The server has loaded new weights; some masks on this page are from the previous ones.", {
      info: true,
      action: ["Label all again", () => this.#labelAllAgain()],
    });
  }

  async #labelAllAgain() {
    if (!(await this.connect())) return;
    this.#results.clear();
    for (const image of this.images) image.boxes.forEach((box) => (box.resultKey = null));
    this.retry();
  }

  /** Returns the boxes of an image for the list: in drawing order, or failed boxes first and then by ascending score. */
  ordered(image) {
    image.boxes.forEach((box, index) => (box.number = index + 1));
    if (!this.worstFirst) return image.boxes;
    const rank = (box) => ({ failed: -1, waiting: 2 })[this.state(image, box)] ?? box.result.score;
    return [...image.boxes].sort((a, b) => rank(a) - rank(b));
  }

  // --- the file ---

  async coco() {
    const annotations = this.images.flatMap((image, index) =>
      image.boxes.map((box) => {
        const result = { labeled: box.result, failed: { error: box.error } }[this.state(image, box)] ?? null;
        const threshold = box.threshold ?? image.threshold;
        return { image: index, box: box.rect, category: box.category, threshold, points: box.points, result };
      }),
    );
    const images = this.images.map(({ name, width, height }) => ({ file_name: name, width, height }));
    const file = await api.coco({ images, annotations, options: this.options, tight_boxes: this.tightBoxes });
    this.#saved = this.#fingerprint();
    return file;
  }

  get isSaved() {
    return this.#saved === this.#fingerprint() || this.images.every((image) => !image.boxes.length);
  }

  #fingerprint() {
    return JSON.stringify(this.images.map((image) => [image.sha256, snapshot(image).boxes, image.threshold, this.options, this.tightBoxes]));
  }
}

function snapshot(image) {
  const boxes = image.boxes.map(({ id, color, rect, category, threshold, points }) => ({
    id, color, rect, category, threshold, points,
  }));
  return { boxes, selected: image.selected };
}

/** Sets the result of a box, and prepares its mask for drawing. */
function setResult(box, key, result) {
  if (box.result !== result) {
    const region = maskRegion(result.rle, result.mask_box);
    box.layer = region && maskLayer(region, box.color);
  }
  Object.assign(box, { result, resultKey: key, error: null, errorKey: null });
}

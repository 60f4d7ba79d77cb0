// What is open and what is known about it: images, boxes, their masks, what can be undone. Draws nothing.

import * as api from "./api.js";
import { sameBox } from "./geometry.js";
import { maskLayer, maskRegion } from "./rle.js";

/** Colors that are far apart for color-blind readers too (Okabe and Ito). */
export const PALETTE = [
  [230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167],
];

const KEPT_ANSWERS = 2000;
const UNDO_STEPS = 200;
const FIRST_PAUSE_MS = 2000;
const LONGEST_PAUSE_MS = 8000;

export class Session extends EventTarget {
  server = null;
  images = [];
  current = null;
  options = { model: null, branch: null, flip: false, agreement: false };
  category = "object";
  showMasks = true;
  showBoxes = true;
  worstFirst = false;
  #answers = new Map();
  #calls = [];
  #nextBox = 1;
  #saved = "";
  #later = null;
  #pause = FIRST_PAUSE_MS;

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
      this.#dropUnserved();
    } catch (error) {
      this.server = null;
      this.notice(error.message, { action: ["Try again", () => this.connect()] });
    }
    this.changed();
    return this.server !== null;
  }

  /** What the model that answers now cannot do is asked for no more. */
  #dropUnserved() {
    const { branches, can_agree: canAgree } = this.server;
    const isBranchServed = this.options.branch === null || branches.includes(this.options.branch);
    if (isBranchServed && (canAgree || !this.options.agreement)) return;
    if (!isBranchServed) this.options.branch = null;
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
    const largest = this.server?.limits.max_image_bytes;
    if (largest && file.size > largest) {
      throw new api.Fault(`${file.size} bytes; the server takes at most ${largest}; compress or shrink it`);
    }
    const known = await api.sendImage(file);
    const image = {
      name: file.name, blob: file, sha256: known.sha256, width: known.width, height: known.height,
      isPlain: known.browser_shows_it, threshold: null, boxes: [], selected: null, view: null, isFitted: true, bitmap: null,
      undo: [], redo: [], tag: null, timer: 0,
    };
    image.bitmap = await this.#pixels(image);
    this.images.push(image);
    if (known.orientation !== 1) {
      this.notice(
        `${file.name}: shown as it is stored; its EXIF tag asks viewers to turn it, but boxes and masks refer to stored pixels`,
        { info: true },
      );
    }
    if (known.frames > 1) this.notice(`${file.name}: holds ${known.frames} pictures; the first is used`, { info: true });
    this.select(image);
  }

  /** The stored pixels: the browser's own decoding of a plain JPEG, the server's of everything else. */
  async #pixels(image) {
    if (image.isPlain) {
      try {
        const bitmap = await createImageBitmap(image.blob);
        if (bitmap.width === image.width && bitmap.height === image.height) return bitmap;
      } catch {
        // A file that this browser does not read: the server does, or says what is wrong with it.
      }
    }
    return createImageBitmap(await this.#withImage(image, () => api.pixels(image.sha256)));
  }

  /** Runs a call that names the image; sends the image again where the playground has let it go. */
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
    const at = this.images.indexOf(image);
    this.images.splice(at, 1);
    image.bitmap.close();
    this.#abandon();
    this.select(this.images[Math.min(at, this.images.length - 1)] ?? null);
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
    const box = { id: `b${number}`, number: 0, color: PALETTE[(number - 1) % PALETTE.length], rect, category: this.category, threshold: null };
    this.current.boxes.push(box);
    this.current.selected = box.id;
    this.#edited();
    return box;
  }

  removeBox(box) {
    this.remember();
    const { boxes } = this.current;
    const at = boxes.indexOf(box);
    boxes.splice(at, 1);
    this.current.selected = boxes[Math.min(at, boxes.length - 1)]?.id ?? null;
    this.#edited();
  }

  /** Changes a field of a box: "rect", "category" or "threshold". Steps with one `tag` in a row are undone together. */
  edit(box, field, value, { tag = null, delay = 0 } = {}) {
    if (field === "rect" ? sameBox(box.rect, value) : box[field] === value) return;
    this.remember(tag);
    box[field] = value;
    this.#edited(delay);
  }

  /** While a box is being dragged: shown, not yet asked for and not yet a step of its own. */
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
    this.#edited(150);
  }

  async setOption(name, value) {
    this.options[name] = value;
    // First what the new model can do: a box is not to fail for an option of the old one.
    if (name === "model") await this.connect();
    this.images.forEach((image) => this.#relabelSoon(image, 0));
    this.changed();
  }

  #edited(delay = 0) {
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
    this.#edited();
  }

  // --- masks ---

  /** What an answer depends on: with the same key it is the same answer. */
  #key(image, box) {
    const { model, branch, flip, agreement } = this.options;
    return JSON.stringify([image.sha256, box.rect, model, branch, flip, agreement, box.threshold ?? image.threshold]);
  }

  /** "labeled", "failed" or "waiting"; a waiting box may still show the mask that it had. */
  state(image, box) {
    const key = this.#key(image, box);
    if (box.answer && box.answerKey === key) return "labeled";
    return box.faultKey === key ? "failed" : "waiting";
  }

  #relabelSoon(image, delay) {
    clearTimeout(image.timer);
    image.timer = setTimeout(() => this.#relabel(image), delay);
  }

  /** Labels again what could not be labeled. */
  retry() {
    for (const image of this.images) {
      image.boxes.forEach((box) => (box.faultKey = null));
      this.#relabelSoon(image, 0);
    }
    this.changed();
  }

  /** A server that is away comes back, most often: what failed for that reason alone is asked for again and again. */
  #tryLater() {
    this.#later ??= setTimeout(() => {
      this.#later = null;
      this.#pause = Math.min(2 * this.#pause, LONGEST_PAUSE_MS);
      this.images.forEach((image) => this.#relabel(image, { isAgain: true }));
    }, this.#pause);
  }

  #relabel(image, { isAgain = false } = {}) {
    const asked = [];
    for (const box of image.boxes) {
      const key = this.#key(image, box);
      const isFailed = box.faultKey === key && !(isAgain && box.fault.code === "UNAVAILABLE");
      if ((box.answer && box.answerKey === key) || isFailed) continue;
      if (this.#answers.has(key)) {
        take(box, key, this.#answers.get(key));
      } else if (!this.#calls.some((call) => call.image === image && call.open.get(box.id) === key)) {
        asked.push([box, key]);
      }
    }
    this.#abandon();
    if (asked.length) this.#call(image, asked);
    this.changed();
  }

  /** Ends the calls whose answers nobody waits for any more. */
  #abandon() {
    // One without open boxes is only about to end.
    for (const call of this.#calls.filter(({ open }) => open.size)) {
      const isWanted = [...call.open].some(([id, key]) => {
        const box = this.images.includes(call.image) && call.image.boxes.find((one) => one.id === id);
        return box && this.#key(call.image, box) === key;
      });
      if (!isWanted) call.controller.abort();
    }
  }

  async #call(image, asked) {
    const call = { image, open: new Map(asked.map(([box, key]) => [box.id, key])), controller: new AbortController() };
    this.#calls.push(call);
    const boxes = asked.map(([box]) => ({ id: box.id, box: box.rect, threshold: box.threshold }));
    const options = { ...this.options, threshold: image.threshold };
    const onLine = (line) => this.#answered(call, line.id, line);
    try {
      await this.#withImage(image, () => api.label(image.sha256, boxes, options, call.controller.signal, onLine));
    } catch (error) {
      if (error.name !== "AbortError") {
        const fault = { code: error.code ?? "INTERNAL", reason: error.reason ?? "", message: error.message };
        for (const id of [...call.open.keys()]) this.#answered(call, id, { id, error: fault });
      }
    } finally {
      this.#calls.splice(this.#calls.indexOf(call), 1);
      this.changed();
    }
  }

  #answered(call, id, line) {
    const key = call.open.get(id);
    call.open.delete(id);
    const box = call.image.boxes.find((one) => one.id === id);
    const isWanted = box !== undefined && this.#key(call.image, box) === key;
    if (line.error) {
      if (isWanted) Object.assign(box, { fault: line.error, faultKey: key });
      if (isWanted && line.error.code === "UNAVAILABLE") this.#tryLater();
    } else {
      this.#pause = FIRST_PAUSE_MS;
      if (this.server === null) this.connect();
      this.#answers.set(key, line);
      if (this.#answers.size > KEPT_ANSWERS) this.#answers.delete(this.#answers.keys().next().value);
      if (isWanted) take(box, key, line);
      this.#checkModel(line.model);
    }
    this.changed();
  }

  #checkModel(model) {
    const known = this.server?.model;
    if (known?.name !== model.name || known.checkpoint_sha256 === model.checkpoint_sha256) return;
    this.server.model = { ...this.server.model, ...model };
    this.notice("The server now serves other weights; the masks on this page are of both.", {
      info: true,
      action: ["Label all again", () => this.#labelAllAgain()],
    });
  }

  async #labelAllAgain() {
    if (!(await this.connect())) return;
    this.#answers.clear();
    for (const image of this.images) image.boxes.forEach((box) => (box.answerKey = null));
    this.retry();
  }

  /** The boxes of the image for a list: as they were drawn, or failures first and then the least certain. */
  ordered(image) {
    image.boxes.forEach((box, at) => (box.number = at + 1));
    if (!this.worstFirst) return image.boxes;
    const rank = (box) => ({ failed: -1, waiting: 2 })[this.state(image, box)] ?? box.answer.score;
    return [...image.boxes].sort((a, b) => rank(a) - rank(b));
  }

  // --- the file ---

  async coco() {
    const annotations = this.images.flatMap((image, at) =>
      image.boxes.map((box) => {
        const answer = { labeled: box.answer, failed: { error: box.fault } }[this.state(image, box)] ?? null;
        const threshold = box.threshold ?? image.threshold;
        return { image: at, box: box.rect, category: box.category, threshold, answer };
      }),
    );
    const images = this.images.map(({ name, width, height }) => ({ file_name: name, width, height }));
    const file = await api.coco({ images, annotations, options: this.options });
    this.#saved = this.#fingerprint();
    return file;
  }

  get isSaved() {
    return this.#saved === this.#fingerprint() || this.images.every((image) => !image.boxes.length);
  }

  #fingerprint() {
    return JSON.stringify(this.images.map((image) => [image.sha256, snapshot(image).boxes, image.threshold, this.options]));
  }
}

function snapshot(image) {
  const boxes = image.boxes.map(({ id, color, rect, category, threshold }) => ({ id, color, rect, category, threshold }));
  return { boxes, selected: image.selected };
}

/** Gives a box its answer, and the mask as something to draw. */
function take(box, key, answer) {
  if (box.answer !== answer) {
    const region = maskRegion(answer.rle, answer.mask_box);
    box.layer = region && maskLayer(region, box.color);
  }
  Object.assign(box, { answer, answerKey: key, fault: null, faultKey: null });
}

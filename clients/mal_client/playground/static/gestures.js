// Mouse, touch and keys on the canvas → changes of the session and of the view.

import { HANDLES, boxBetween, contains, handlePoint, moved, resized } from "./geometry.js";

const CLICK_PX = 4;
const REACH = { mouse: 7, pen: 10, touch: 22 };
const KEY_DELAY_MS = 250;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const CURSORS = { n: "ns", s: "ns", e: "ew", w: "ew", nw: "nwse", se: "nwse", ne: "nesw", sw: "nesw" };

export class Gestures {
  #session;
  #stage;
  #canvas;
  #fingers = new Map();
  /** What is under way: {kind: "draw" | "move" | "resize" | "pan" | "pinch", …}; null: nothing. */
  #now = null;
  #isSpaceDown = false;

  constructor(session, stage, canvas) {
    [this.#session, this.#stage, this.#canvas] = [session, stage, canvas];
    const on = (name, handler, options) => canvas.addEventListener(name, handler.bind(this), options);
    on("pointerdown", this.#down);
    on("pointermove", this.#move);
    on("pointerup", this.#up);
    on("pointercancel", this.#cancelled);
    on("lostpointercapture", (event) => this.#fingers.delete(event.pointerId));
    on("contextmenu", (event) => event.preventDefault());
    on("wheel", this.#wheel, { passive: false });
    on("keydown", this.#keyDown);
    on("keyup", (event) => event.key === " " && (this.#isSpaceDown = false));
    on("blur", () => (this.#isSpaceDown = false));
  }

  #at(event) {
    const { left, top } = this.#canvas.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  // --- pointers ---

  #down(event) {
    if (this.#session.current === null) return;
    const at = this.#at(event);
    this.#fingers.set(event.pointerId, at);
    this.#canvas.setPointerCapture(event.pointerId);
    if (this.#fingers.size === 2) {
      this.#giveUp();
      this.#now = { kind: "pinch", ...this.#spread() };
    } else if (this.#fingers.size > 2) {
      return;
    } else if (event.button !== 0 || this.#isSpaceDown) {
      this.#now = { kind: "pan", last: at };
    } else {
      this.#now = this.#grabbed(event, at);
    }
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
  }

  #grabbed(event, at) {
    const point = this.#stage.toImage(at);
    const box = this.#session.showBoxes ? this.#session.selectedBox : null;
    const handle = box && this.#handleAt(box, at, event.pointerType);
    if (handle) return { kind: "resize", box, handle, before: box.rect };
    if (box && contains(box.rect, point) && !event.shiftKey) {
      return { kind: "move", box, before: box.rect, start: at, from: point, isMoving: false };
    }
    return { kind: "draw", start: at, from: point };
  }

  #handleAt(box, at, pointer) {
    const reach = REACH[pointer] ?? REACH.mouse;
    const distance = (name) => {
      const handle = this.#stage.toCanvas(handlePoint(box.rect, name));
      return Math.hypot(handle.x - at.x, handle.y - at.y);
    };
    const nearest = HANDLES.reduce((a, b) => (distance(b) < distance(a) ? b : a));
    return distance(nearest) <= reach ? nearest : null;
  }

  #move(event) {
    const at = this.#at(event);
    if (this.#fingers.has(event.pointerId)) this.#fingers.set(event.pointerId, at);
    const now = this.#now;
    if (now === null) return this.#showCursor(event, at);
    const image = this.#session.current;
    const point = this.#stage.toImage(at);
    if (now.kind === "pan") {
      this.#stage.panBy(at.x - now.last.x, at.y - now.last.y);
      now.last = at;
    } else if (now.kind === "pinch") {
      this.#pinch(now);
    } else if (now.kind === "resize") {
      this.#session.drag(now.box, resized(now.before, now.handle, point, image));
    } else if (now.kind === "move") {
      now.isMoving ||= Math.hypot(at.x - now.start.x, at.y - now.start.y) >= CLICK_PX;
      if (now.isMoving) this.#session.drag(now.box, moved(now.before, point.x - now.from.x, point.y - now.from.y, image));
    } else if (Math.hypot(at.x - now.start.x, at.y - now.start.y) >= CLICK_PX || this.#stage.draft) {
      this.#stage.draft = boxBetween(now.from, point, image);
      this.#stage.redraw();
    }
  }

  #up(event) {
    this.#fingers.delete(event.pointerId);
    const now = this.#now;
    if (now === null) return;
    if (now.kind === "pinch") {
      // The second finger lifts later; what it does alone is no drawing.
      if (this.#fingers.size === 0) this.#now = null;
      return;
    }
    this.#now = null;
    if (now.kind === "resize" || now.kind === "move") this.#session.dropped(now.box, now.before);
    if (now.kind === "move" && !now.isMoving) this.#click(now.from);
    if (now.kind === "draw") this.#finishDrawing(now);
  }

  #finishDrawing(now) {
    const rect = this.#stage.draft;
    this.#stage.draft = null;
    if (rect !== null) this.#session.addBox(rect);
    else this.#click(now.from);
    this.#stage.redraw();
  }

  /** Selects the smallest box there; at a second click the next larger one. */
  #click(point) {
    const { boxes, selected } = this.#session.current;
    const hit = boxes.filter((box) => contains(box.rect, point)).sort((a, b) => area(a) - area(b));
    const at = hit.findIndex((box) => box.id === selected);
    this.#session.selectBox(hit[(at + 1) % Math.max(1, hit.length)]?.id ?? null);
  }

  #spread() {
    const [a, b] = this.#fingers.values();
    return { middle: { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 }, distance: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)) };
  }

  #pinch(now) {
    if (this.#fingers.size < 2) return;
    const { middle, distance } = this.#spread();
    this.#stage.panBy(middle.x - now.middle.x, middle.y - now.middle.y);
    this.#stage.zoomBy(distance / now.distance, middle);
    Object.assign(now, { middle, distance });
  }

  #cancelled(event) {
    this.#fingers.delete(event.pointerId);
    this.#giveUp();
  }

  /** What is under way is as if it had not begun. */
  #giveUp() {
    const now = this.#now;
    this.#now = null;
    this.#stage.draft = null;
    if (now?.before) this.#session.drag(now.box, now.before);
    this.#stage.redraw();
  }

  #showCursor(event, at) {
    if (this.#session.current === null) return;
    const box = this.#session.showBoxes ? this.#session.selectedBox : null;
    const handle = box && this.#handleAt(box, at, event.pointerType);
    const isInside = box && !event.shiftKey && contains(box.rect, this.#stage.toImage(at));
    this.#canvas.style.cursor = this.#isSpaceDown ? "grab" : handle ? `${CURSORS[handle]}-resize` : isInside ? "move" : "crosshair";
  }

  #wheel(event) {
    if (this.#session.current === null) return;
    event.preventDefault();
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 16 : 1;
    if (event.shiftKey) return this.#stage.panBy(-(event.deltaX || event.deltaY) * lines, 0);
    // A pinch on a trackpad comes as a wheel with Ctrl and small steps.
    this.#stage.zoomBy(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0015)), this.#at(event));
  }

  // --- keys ---

  #keyDown(event) {
    if (this.#session.current === null || event.metaKey || event.ctrlKey) return;
    const handled = event.key in ARROWS ? this.#arrow(event) : this.#key(event.key);
    if (handled !== false) event.preventDefault();
  }

  #key(key) {
    const [session, stage] = [this.#session, this.#stage];
    const actions = {
      n: () => this.addInView(),
      m: () => (session.showMasks = !session.showMasks),
      "[": () => this.#step(-1),
      "]": () => this.#step(1),
      Delete: () => session.selectedBox && session.removeBox(session.selectedBox),
      "+": () => stage.zoomBy(1.25),
      "=": () => stage.zoomBy(1.25),
      "-": () => stage.zoomBy(0.8),
      0: () => stage.fit(),
      1: () => stage.zoomTo(1),
      " ": () => (this.#isSpaceDown = true),
      Escape: () => (this.#now === null ? session.selectBox(null) : this.#giveUp()),
    };
    actions.Backspace = actions.Delete;
    const action = actions[key.length === 1 ? key.toLowerCase() : key];
    if (action === undefined) return false;
    action();
    session.changed();
    return true;
  }

  #arrow(event) {
    const pace = event.shiftKey ? 10 : 1;
    const [dx, dy] = ARROWS[event.key].map((step) => step * pace);
    const box = this.#session.selectedBox;
    if (box === null) return this.#stage.panBy(-8 * dx, -8 * dy);
    const [x, y, w, h] = box.rect;
    const image = this.#session.current;
    const corner = { x: x + w + dx, y: y + h + dy };
    const rect = event.altKey ? resized(box.rect, "se", corner, image) : moved(box.rect, dx, dy, image);
    return this.#session.edit(box, "rect", rect, { tag: `keys ${box.id}`, delay: KEY_DELAY_MS });
  }

  /** A box in the middle third of what is in view. */
  addInView() {
    const [a, b] = this.#stage.visible();
    const third = { x: (b.x - a.x) / 3, y: (b.y - a.y) / 3 };
    const rect = boxBetween({ x: a.x + third.x, y: a.y + third.y }, { x: b.x - third.x, y: b.y - third.y }, this.#session.current);
    if (rect !== null) this.#session.addBox(rect);
  }

  #step(by) {
    const { current } = this.#session;
    const order = this.#session.ordered(current);
    if (!order.length) return;
    const at = order.findIndex((box) => box.id === current.selected);
    const next = order[(at < 0 ? (by > 0 ? 0 : order.length - 1) : at + by + order.length) % order.length];
    this.#session.selectBox(next.id);
    this.#stage.reveal(next.rect);
  }
}

const area = (box) => box.rect[2] * box.rect[3];

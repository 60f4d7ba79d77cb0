// Translates mouse, touch and keyboard events on the canvas into changes of the session and of the view.

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
  #pointers = new Map();
  /** The active gesture: {type: "draw" | "move" | "resize" | "pan" | "pinch", …}, or null; `start` if it may be a click. */
  #gesture = null;
  #isSpaceDown = false;

  constructor(session, stage, canvas) {
    [this.#session, this.#stage, this.#canvas] = [session, stage, canvas];
    const on = (name, handler, options) => canvas.addEventListener(name, handler.bind(this), options);
    on("pointerdown", this.#down);
    on("pointermove", this.#move);
    on("pointerup", this.#up);
    on("pointercancel", this.#pointerCancelled);
    on("lostpointercapture", (event) => this.#pointers.delete(event.pointerId));
    on("contextmenu", (event) => event.preventDefault());
    on("wheel", this.#wheel, { passive: false });
    on("keydown", this.#keyDown);
    on("keyup", (event) => event.key === " " && (this.#isSpaceDown = false));
    on("blur", () => (this.#isSpaceDown = false));
  }

  #position(event) {
    const { left, top } = this.#canvas.getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  // --- pointers ---

  #down(event) {
    if (this.#session.current === null) return;
    const at = this.#position(event);
    this.#pointers.set(event.pointerId, at);
    this.#canvas.setPointerCapture(event.pointerId);
    if (this.#pointers.size === 2) {
      this.#cancelGesture();
      this.#gesture = { type: "pinch", ...this.#pinchState() };
    } else if (this.#pointers.size > 2) {
      return;
    } else if (event.button !== 0 || this.#isSpaceDown) {
      this.#gesture = { type: "pan", last: at };
    } else {
      this.#gesture = this.#startGesture(event, at);
    }
    event.preventDefault();
    this.#canvas.focus({ preventScroll: true });
  }

  #startGesture(event, at) {
    const point = this.#stage.toImage(at);
    const box = this.#session.showBoxes ? this.#session.selectedBox : null;
    const handle = box && this.#handleAt(box, at, event.pointerType);
    const drag = { box, before: box?.rect, start: at, from: point, isMoving: false };
    if (handle) return { ...drag, type: "resize", handle };
    if (box && contains(box.rect, point) && !event.shiftKey) return { ...drag, type: "move" };
    return { type: "draw", start: at, from: point };
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
    const at = this.#position(event);
    if (this.#pointers.has(event.pointerId)) this.#pointers.set(event.pointerId, at);
    const gesture = this.#gesture;
    if (gesture === null) return this.#showCursor(event, at);
    const image = this.#session.current;
    const point = this.#stage.toImage(at);
    if (gesture.start) gesture.isMoving ||= Math.hypot(at.x - gesture.start.x, at.y - gesture.start.y) >= CLICK_PX;
    if (gesture.type === "pan") {
      this.#stage.panBy(at.x - gesture.last.x, at.y - gesture.last.y);
      gesture.last = at;
    } else if (gesture.type === "pinch") {
      this.#pinch(gesture);
    } else if (!gesture.isMoving) {
      return; // a click so far
    } else if (gesture.type === "resize") {
      this.#session.drag(gesture.box, resized(gesture.before, gesture.handle, point, image));
    } else if (gesture.type === "move") {
      this.#session.drag(gesture.box, moved(gesture.before, point.x - gesture.from.x, point.y - gesture.from.y, image));
    } else {
      this.#stage.draft = boxBetween(gesture.from, point, image);
      this.#stage.redraw();
    }
  }

  #up(event) {
    this.#pointers.delete(event.pointerId);
    const gesture = this.#gesture;
    if (gesture === null) return;
    if (gesture.type === "pinch") {
      // The remaining finger of a pinch does not draw.
      if (this.#pointers.size === 0) this.#gesture = null;
      return;
    }
    this.#gesture = null;
    if (gesture.type === "draw") this.#finishDraw(gesture);
    else if (gesture.isMoving) this.#session.dropped(gesture.box, gesture.before);
    else if (gesture.box) this.#clickOn(gesture.box, gesture.from, event.altKey);
  }

  #finishDraw(gesture) {
    const rect = this.#stage.draft;
    this.#stage.draft = null;
    if (rect !== null) this.#session.addBox(rect);
    else this.#click(gesture.from);
    this.#stage.redraw();
  }

  /** Adds a point to the selected box if the click is inside; Alt adds one of the other label. */
  #clickOn(box, point, isOther) {
    const { width, height } = this.#session.current;
    const pixel = { x: Math.floor(point.x) + 0.5, y: Math.floor(point.y) + 0.5 };
    const isInside = contains(box.rect, pixel) && contains([0, 0, width, height], pixel);
    const label = this.#session.pointLabel;
    if (isInside && this.#session.maxPoints > 0) this.#session.addPoint(box, pixel, isOther ? 1 - label : label);
    else this.#click(point);
  }

  /** Selects the smallest box at a point; another click selects the next larger one. */
  #click(point) {
    const { boxes, selected } = this.#session.current;
    const hit = boxes.filter((box) => contains(box.rect, point)).sort((a, b) => area(a) - area(b));
    const at = hit.findIndex((box) => box.id === selected);
    this.#session.selectBox(hit[(at + 1) % Math.max(1, hit.length)]?.id ?? null);
  }

  #pinchState() {
    const [a, b] = this.#pointers.values();
    return { middle: { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 }, distance: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)) };
  }

  #pinch(gesture) {
    if (this.#pointers.size < 2) return;
    const { middle, distance } = this.#pinchState();
    this.#stage.panBy(middle.x - gesture.middle.x, middle.y - gesture.middle.y);
    this.#stage.zoomBy(distance / gesture.distance, middle);
    Object.assign(gesture, { middle, distance });
  }

  #pointerCancelled(event) {
    this.#pointers.delete(event.pointerId);
    this.#cancelGesture();
  }

  /** Undoes the active gesture. */
  #cancelGesture() {
    const gesture = this.#gesture;
    this.#gesture = null;
    this.#stage.draft = null;
    if (gesture?.before) this.#session.drag(gesture.box, gesture.before);
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
    // A pinch on a trackpad arrives as a wheel event with Ctrl and small steps.
    this.#stage.zoomBy(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0015)), this.#position(event));
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
      p: () => (session.pointLabel = 1 - session.pointLabel),
      "[": () => this.#step(-1),
      "]": () => this.#step(1),
      Delete: () => session.selectedBox && session.removeBox(session.selectedBox),
      "+": () => stage.zoomBy(1.25),
      "=": () => stage.zoomBy(1.25),
      "-": () => stage.zoomBy(0.8),
      0: () => stage.fit(),
      1: () => stage.zoomTo(1),
      " ": () => (this.#isSpaceDown = true),
      Escape: () => (this.#gesture === null ? session.selectBox(null) : this.#cancelGesture()),
    };
    actions.Backspace = actions.Delete;
    const action = actions[key.length === 1 ? key.toLowerCase() : key];
    if (action === undefined) return false;
    action();
    session.changed();
    return true;
  }

  #arrow(event) {
    const stepPx = event.shiftKey ? 10 : 1;
    const [dx, dy] = ARROWS[event.key].map((step) => step * stepPx);
    const box = this.#session.selectedBox;
    if (box === null) return this.#stage.panBy(-8 * dx, -8 * dy);
    const [x, y, w, h] = box.rect;
    const image = this.#session.current;
    const corner = { x: x + w + dx, y: y + h + dy };
    const rect = event.altKey ? resized(box.rect, "se", corner, image) : moved(box.rect, dx, dy, image);
    return this.#session.edit(box, "rect", rect, { tag: `keys ${box.id}`, delay: KEY_DELAY_MS });
  }

  /** Adds a box in the middle third of the view. */
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

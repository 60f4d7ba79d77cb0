// The side panel: settings, the selected box, and the list of boxes.

const byId = (id) => document.getElementById(id);
const RETRYING = " — retrying automatically";
const AGREEMENT = "Measure the IoU of the masks of both networks; doubles the work";
const NO_AGREEMENT = "Needs two networks; this model has only one";
/** Names of the labels of points. */
const NAMES = ["background", "object"];
const FIELDS = ["box-x", "box-y", "box-w", "box-h"];

export class Panel {
  #session;
  #stage;
  #rows = new Map();
  #isScheduled = false;

  constructor(session, stage) {
    [this.#session, this.#stage] = [session, stage];
    session.addEventListener("change", () => this.#renderSoon());
    this.#wireSettings();
    this.#wireSelected();
  }

  #wireSettings() {
    const session = this.#session;
    byId("model").addEventListener("change", (event) => session.setOption("model", event.target.value));
    byId("branch").addEventListener("change", (event) => session.setOption("branch", event.target.value || null));
    for (const name of ["flip", "agreement"]) {
      byId(name).addEventListener("change", (event) => session.setOption(name, event.target.checked));
    }
    byId("category").addEventListener("change", (event) => (session.category = event.target.value.trim() || "object"));
    byId("threshold-on").addEventListener("change", (event) =>
      session.setThreshold(event.target.checked ? Number(byId("threshold").value) : null),
    );
    byId("threshold").addEventListener("input", (event) => session.setThreshold(Number(event.target.value)));
    for (const [id, name] of [["show-masks", "showMasks"], ["show-boxes", "showBoxes"], ["tight", "tightBoxes"], ["worst", "worstFirst"]]) {
      byId(id).addEventListener("change", (event) => {
        session[name] = event.target.checked;
        session.changed();
      });
    }
  }

  #wireSelected() {
    const session = this.#session;
    const edit = (field, value, options) => session.selectedBox && session.edit(session.selectedBox, field, value, options);
    FIELDS.forEach((id, index) =>
      byId(id).addEventListener("change", (event) => {
        const number = event.target.valueAsNumber;
        if (Number.isFinite(number) && session.selectedBox) edit("rect", session.selectedBox.rect.with(index, number));
        else session.changed();
      }),
    );
    byId("box-category").addEventListener("change", (event) => edit("category", event.target.value.trim() || "object"));
    byId("box-threshold-on").addEventListener("change", (event) =>
      edit("threshold", event.target.checked ? Number(byId("box-threshold").value) : null),
    );
    byId("box-threshold").addEventListener("input", (event) =>
      edit("threshold", Number(event.target.value), { tag: `threshold ${session.selectedBox?.id}`, delay: 150 }),
    );
    byId("delete").addEventListener("click", () => session.selectedBox && session.removeBox(session.selectedBox));
    byId("point-last").addEventListener("click", () => edit("points", session.selectedBox?.points.slice(0, -1)));
    for (const label of [0, 1]) {
      byId(`point-${label}`).addEventListener("click", () => {
        session.pointLabel = label;
        session.changed();
      });
    }
  }

  #renderSoon() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => {
      this.#isScheduled = false;
      this.#render();
    });
  }

  #render() {
    const { server, current } = this.#session;
    const order = current === null ? [] : this.#session.ordered(current);
    this.#renderServer(server);
    if (server !== null) this.#renderNetworks(server);
    this.#renderSettings(server, current);
    this.#renderSelected(this.#session.selectedBox);
    this.#renderList(current, order);
    byId("status").textContent = this.#summary(current);
    const content = [this.#summary(current), pointsText(this.#session.selectedBox)].filter(Boolean).join("; ");
    byId("stage").setAttribute("aria-label", current === null ? "No image yet" : `${current.name}: ${content}`);
  }

  #renderServer(server) {
    const line = byId("server");
    const text = server
      ? `${server.address} · ${server.model.name} · ${server.arch} · ${server.devices.join(", ")}`
      : "No labeling server";
    if (line.textContent === text) return;
    line.textContent = text;
    line.title = server ? `checkpoint ${server.model.checkpoint_sha256}\nscore: ${server.score_meaning}` : "";
    if (server === null) return;
    this.#renderModels(server);
    byId("branch").options[0].textContent = `default (${server.model.branch})`;
  }

  /** Offers the networks of the model, and the agreement of two networks. */
  #renderNetworks({ branches, can_agree: canAgree }) {
    const { branch, agreement } = this.#session.options;
    const select = byId("branch");
    if (select.dataset.names !== JSON.stringify(branches)) {
      select.dataset.names = JSON.stringify(branches);
      select.replaceChildren(select.options[0], ...branches.map((name) => new Option(name, name)));
    }
    select.value = branch ?? "";
    byId("agreement").disabled = !canAgree;
    byId("agreement").checked = agreement;
    byId("agreement").parentElement.title = canAgree ? AGREEMENT : NO_AGREEMENT;
  }

  /** Offers the models of the server if it has several. */
  #renderModels({ models, model }) {
    const select = byId("model");
    byId("models").hidden = models.length < 2;
    if (select.dataset.names !== JSON.stringify(models)) {
      select.dataset.names = JSON.stringify(models);
      select.replaceChildren(...models.map((name) => new Option(name, name)));
    }
    select.value = model.name;
  }

  #renderSettings(server, current) {
    const names = new Set([...(server?.categories ?? []), ...this.#session.images.flatMap((i) => i.boxes.map((b) => b.category))]);
    const list = byId("categories");
    if (list.dataset.names !== JSON.stringify([...names])) {
      list.dataset.names = JSON.stringify([...names]);
      list.replaceChildren(...[...names].map((name) => new Option(name, name)));
    }
    const defaults = server ? [...new Set(server.mask_thresholds)] : [];
    this.#renderThreshold("threshold", current !== null, current?.threshold ?? null, defaults.length === 1 ? `model: ${defaults[0].toFixed(2)}` : "model default");
    byId("threshold-shown").title = server ? `Defaults of the model by size class: ${server.mask_thresholds.join(", ")}` : "";
    byId("show-masks").checked = this.#session.showMasks;
  }

  #renderThreshold(id, isEnabled, value, inherited) {
    byId(`${id}-on`).disabled = !isEnabled;
    byId(`${id}-on`).checked = value !== null;
    byId(id).disabled = !isEnabled || value === null;
    if (value !== null) byId(id).value = value;
    byId(`${id}-shown`).textContent = value === null ? inherited : value.toFixed(2);
  }

  #renderSelected(box) {
    byId("selected").disabled = box === null;
    byId("selected-title").textContent = box === null ? "No box selected" : `Box ${box.number}`;
    FIELDS.forEach((id, index) => {
      // Keeps the text that the user is typing.
      if (document.activeElement !== byId(id) || box === null) byId(id).value = box === null ? "" : box.rect[index];
    });
    if (document.activeElement !== byId("box-category") || box === null) byId("box-category").value = box?.category ?? "";
    this.#renderThreshold("box-threshold", box !== null, box?.threshold ?? null, "image setting");
    this.#renderPoints(box?.points ?? []);
  }

  #renderPoints(points) {
    byId("point-labels").hidden = !this.#session.maxPoints;
    for (const label of [0, 1]) byId(`point-${label}`).setAttribute("aria-pressed", String(this.#session.pointLabel === label));
    byId("point-last").disabled = !points.length;
    const text = points.length ? counted(points) : "No points";
    // Assigned only when it changes: screen readers announce it.
    if (byId("points").textContent !== text) byId("points").textContent = text;
    byId("points").title = points.map(placed).join("\n");
  }

  #renderList(image, order) {
    const list = byId("list");
    const kept = new Map();
    order.forEach((box) => kept.set(box.id, this.#rows.get(box.id) ?? this.#newRow(box.id)));
    for (const [id, row] of this.#rows) if (kept.get(id) !== row) row.item.remove();
    this.#rows = kept;
    order.forEach((box, index) => {
      const row = kept.get(box.id);
      this.#fillRow(row, image, box);
      if (list.children[index] !== row.item) {
        const focused = row.item.contains(document.activeElement) ? document.activeElement : null;
        list.insertBefore(row.item, list.children[index] ?? null);
        focused?.focus();
      }
    });
  }

  #newRow(id) {
    const item = document.createElement("li");
    const button = element("button", "box");
    button.type = "button";
    button.addEventListener("click", () => {
      this.#session.selectBox(id);
      if (this.#session.selectedBox) this.#stage.reveal(this.#session.selectedBox.rect);
    });
    item.append(button);
    return { item, button, shown: "" };
  }

  #fillRow(row, image, box) {
    const state = this.#session.state(image, box);
    row.button.setAttribute("aria-pressed", String(image.selected === box.id));
    const shown = JSON.stringify([state, box.number, box.category, box.color, box.threshold, box.points.length, state === "labeled" ? summaryOf(box.result) : box.error]);
    if (row.shown === shown) return;
    row.shown = shown;
    row.item.dataset.state = state;
    const swatch = element("span", "swatch");
    swatch.style.background = `rgb(${box.color.join(" ")})`;
    row.button.replaceChildren(swatch, element("span", "name", `${box.number} · ${box.category}`), ...this.#chips(state, box));
    row.item.querySelector(".error")?.remove();
    if (state === "failed") row.item.append(this.#errorElement(box));
  }

  #chips(state, box) {
    if (state === "waiting") return [element("span", "chip wait", "waiting…")];
    if (state === "failed") return [element("span", "chip flag", "no mask")];
    const { points } = box;
    const { score, agreement, flags } = box.result;
    const chips = [element("span", "chip", `score ${score.toFixed(3)}`)];
    chips[0].title = this.#session.server?.score_meaning ?? "";
    if (points.length) chips.push(element("span", "chip", counted(points)));
    if (agreement !== null) chips.push(element("span", "chip", `agreement ${agreement.toFixed(3)}`));
    for (const flag of flags) {
      const chip = element("span", "chip flag", flag.toLowerCase().replaceAll("_", " "));
      chip.title = this.#session.server?.flags[flag] ?? flag;
      chips.push(chip);
    }
    return chips;
  }

  #errorElement(box) {
    const item = element("div", "error");
    item.append(element("span", "", box.error.message + (box.error.code === "UNAVAILABLE" ? RETRYING : "")));
    // Retrying does not help an invalid box.
    if (box.error.code === "INVALID_ARGUMENT") return item;
    const retry = element("button", "", "Try again");
    retry.type = "button";
    retry.addEventListener("click", () => this.#session.retry());
    item.append(retry);
    return item;
  }

  #summary(image) {
    if (image === null || !image.boxes.length) return "No boxes yet.";
    const count = { labeled: 0, failed: 0, waiting: 0 };
    image.boxes.forEach((box) => count[this.#session.state(image, box)]++);
    const parts = [`${count.labeled} of ${image.boxes.length} with a mask`];
    if (count.waiting) parts.push(`${count.waiting} waiting`);
    if (count.failed) parts.push(`${count.failed} failed`);
    return parts.join(" · ");
  }
}

const counted = ({ length }) => `${length} ${length === 1 ? "point" : "points"}`;
const placed = ([x, y, label]) => `${NAMES[label]} at ${Math.floor(x)}, ${Math.floor(y)}`;
const pointsText = (box) => (box?.points.length ? `points of box ${box.number}: ${box.points.map(placed).join(", ")}` : "");
const summaryOf = ({ score, agreement, flags }) => [score, agreement, flags];

function element(name, className, text = "") {
  const created = document.createElement(name);
  created.className = className;
  created.textContent = text;
  return created;
}

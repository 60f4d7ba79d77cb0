// Connects the parts of the page: opening, pasting and dropping images, the toolbar, notices, the download.

import { Gestures } from "./gestures.js";
import { Panel } from "./panel.js";
import { Session } from "./session.js";
import { Stage } from "./stage.js";

const byId = (id) => document.getElementById(id);

const session = new Session();
const canvas = byId("stage");
const stage = new Stage(session, canvas);
const gestures = new Gestures(session, stage, canvas);
new Panel(session, stage);

// The cookie has the key now; remove it from the address bar and the history.
history.replaceState(null, "", location.pathname);

// --- opening ---

const isImage = (file) => file.type.startsWith("image/") || /\.(jpe?g|png|webp|bmp|tiff?)$/i.test(file.name);

async function open(files) {
  const imageFiles = files.filter(isImage);
  for (const other of files.filter((file) => !isImage(file))) session.notice(`${other.name}: not an image`);
  await session.open(imageFiles);
  canvas.focus({ preventScroll: true });
}

byId("files").addEventListener("change", (event) => {
  const files = [...event.target.files];
  // Allows the user to choose the same file again.
  event.target.value = "";
  open(files);
});

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  open(files);
});

let dragDepth = 0;
const showDrop = (change) => {
  dragDepth = Math.max(0, dragDepth + change);
  byId("drop").classList.toggle("over", dragDepth > 0);
};
const isFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => isFiles(event) && showDrop(1));
document.addEventListener("dragleave", (event) => isFiles(event) && showDrop(-1));
document.addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!isFiles(event)) return;
  event.preventDefault();
  showDrop(-dragDepth);
  open([...event.dataTransfer.files]);
});

// --- the toolbar ---

const on = (id, action) => byId(id).addEventListener("click", action);
on("add", () => gestures.addInView());
on("undo", () => session.undo());
on("redo", () => session.redo());
on("zoom-in", () => stage.zoomBy(1.25));
on("zoom-out", () => stage.zoomBy(0.8));
on("fit", () => stage.fit());
on("full", () => stage.zoomTo(1));
on("help-button", () => byId("help").showModal());
on("close", () => {
  const { current } = session;
  const boxes = current.boxes.length;
  if (!boxes || confirm(`Close ${current.name} with its ${boxes} ${boxes === 1 ? "box" : "boxes"}?`)) session.close(current);
});
byId("image").addEventListener("change", (event) => session.select(session.images[event.target.selectedIndex]));

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=checkbox]):not([type=range]), select, textarea");
  if (!(event.ctrlKey || event.metaKey) || isTyping) return;
  const key = event.key.toLowerCase();
  if (key === "z" && !event.shiftKey) session.undo();
  else if (key === "y" || key === "z") session.redo();
  else return;
  event.preventDefault();
});

on("download", async () => {
  try {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await session.coco());
    const [first, ...others] = session.images;
    link.download = others.length ? "playground.coco.json" : `${first.name.replace(/\.[^.]*$/, "")}.coco.json`;
    link.click();
    // Delayed, because the browser reads the URL after the click.
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    session.notice(`COCO file: ${error.message}`);
  }
});

addEventListener("beforeunload", (event) => {
  if (!session.isSaved) event.preventDefault();
});

// --- session events ---

session.addEventListener("change", () => {
  const { current, images } = session;
  const has = current !== null;
  byId("empty").hidden = has;
  for (const id of ["close", "add", "zoom-in", "zoom-out", "fit", "full", "image"]) byId(id).disabled = !has;
  byId("download").disabled = !images.some((image) => image.boxes.length);
  byId("undo").disabled = !current?.undo.length;
  byId("redo").disabled = !current?.redo.length;
  byId("zoom").textContent = has ? `${Math.round(stage.view.scale * 100)} %` : "–";
  const select = byId("image");
  const names = images.map((image) => image.name);
  if (select.dataset.names !== JSON.stringify(names)) {
    select.dataset.names = JSON.stringify(names);
    select.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  if (has) select.selectedIndex = images.indexOf(current);
});

session.addEventListener("notice", ({ detail: { text, info, action } }) => {
  const notice = document.createElement("div");
  notice.className = info ? "notice info" : "notice";
  const message = document.createElement("span");
  message.textContent = text;
  notice.append(message);
  const addButton = (label, onClick) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", () => {
      notice.remove();
      onClick();
    });
    notice.append(button);
  };
  if (action !== null) addButton(...action);
  addButton("Dismiss", () => canvas.focus({ preventScroll: true }));
  byId("notices").append(notice);
});

await session.connect();

// The Try page: wires the photograph, the tools, the versions, the fill and its result together.

import { api, toast } from "./studio.js";
import { Comparison } from "./try-compare.js";
import { ask, byId, debounce, listNotes, loadImage, make, percent } from "./try-dom.js";
import { attachEdges } from "./try-edges.js";
import { Editor } from "./try-editor.js";
import { Filling } from "./try-fill.js";
import { attachCrosshair, attachHand, attachShortcuts } from "./try-keys.js";
import { attachSources, upload } from "./try-start.js";
import { Sync, check } from "./try-sync.js";
import { Versions } from "./try-versions.js";

const QUIET_MS = 400; // after the last stroke, before the hole is sent
const REFRESH_MS = 5000; // between two questions whether there are other versions

const editor = new Editor(byId("stage"));
const versions = new Versions();
const sync = new Sync(editor);
const edges = attachEdges(editor, versions, sync);
const filling = new Filling();
const comparison = new Comparison(editor);
let file = null; // of the photograph, for its other frames
let holeFraction = 0;

// ---- the photograph

/** Open a photograph; what is painted is only dropped after a question, and only when the new photograph is there. */
async function open(load, from, hasHole = holeFraction > 0) {
  if (!byId("editor").hidden && hasHole && !(await ask(byId("replace")))) return;
  document.body.classList.add("busy");
  try {
    const photo = await load();
    const image = await loadImage(photo.view);
    filling.cancel();
    file = from;
    showPhoto(photo, image);
  } catch (error) {
    toast(error.message, "bad");
  } finally {
    document.body.classList.remove("busy");
  }
}

function showPhoto(photo, image) {
  comparison.hide();
  comparison.results = [];
  byId("start").hidden = true;
  byId("editor").hidden = false;
  document.body.classList.add("editing");
  setMode("edit");
  editor.show(photo, image);
  byId("photo-name").textContent = photo.name;
  byId("photo-name").title = photo.name;
  const facts = [`${photo.width} × ${photo.height}`, photo.format, photo.mode];
  byId("photo-facts").textContent = facts.filter(Boolean).join(" · ");
  listNotes(byId("photo-notes"), (photo.notes ?? []).map((text) => ({ text })));
  listNotes(byId("mask-notes"), []);
  showFrames(photo);
  message("");
  holeFraction = 0;
  showHole();
  editor.stage.focus({ preventScroll: true });
}

function showFrames({ frames, frame }) {
  byId("frame-choice").hidden = !(frames > 1 && file);
  byId("frame").replaceChildren(...Array.from({ length: frames ?? 1 }, (_, at) => make("option", {
    value: String(at + 1), textContent: `${at + 1} of ${frames}`, selected: at + 1 === frame,
  })));
}

byId("frame").addEventListener("change", () => {
  const from = file;
  open(() => upload(from, byId("frame").value), from);
});

// ---- tools

const commands = {
  undo: () => editor.undo(),
  redo: () => editor.redo(),
  invert: () => editor.invert(),
  clear: () => editor.clear(),
  "zoom-in": () => editor.view.zoom(comparison.pane, 1.25),
  "zoom-out": () => editor.view.zoom(comparison.pane, 0.8),
  "zoom-full": () => editor.view.zoom(comparison.pane, 1 / (editor.view.scale)),
  fit: () => editor.view.fit(comparison.pane),
  help: () => byId("keys").showModal(),
};
for (const button of document.querySelectorAll("[data-command]")) {
  button.addEventListener("click", commands[button.dataset.command]);
}
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => editor.choose(button.dataset.tool));
}
for (const input of [byId("size"), byId("size-number")]) {
  input.addEventListener("input", () => input.value && (editor.size = input.value));
}

function showTool() {
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === editor.tool));
  }
  const [range, number] = [byId("size"), byId("size-number")];
  range.max = number.max = String(editor.isPen ? editor.maxPen : editor.maxBrush);
  range.value = String(editor.size);
  if (document.activeElement !== number) number.value = String(editor.size);
  range.disabled = number.disabled = editor.tool === "pan" || editor.tool === "box";
}

function showHistory() {
  document.querySelector('[data-command="undo"]').disabled = !editor.history.canUndo;
  document.querySelector('[data-command="redo"]').disabled = !editor.history.canRedo;
}

editor.addEventListener("tool", showTool);
editor.history.addEventListener("change", showHistory);
editor.addEventListener("say", (event) => { byId("announcer").textContent = event.detail; });
editor.view.addEventListener("change", () => {
  byId("zoom").textContent = `${Math.round(100 * editor.view.scale)} %`;
});

// ---- the hole

sync.onMeasured = (fraction) => {
  holeFraction = fraction;
  showHole();
};

const settle = debounce(QUIET_MS, async () => {
  const { photo } = editor;
  try {
    const fraction = await sync.send();
    if (fraction === null) return;
    holeFraction = fraction;
    showHole();
    edges.refresh();
    await checkHole(photo);
  } catch (error) {
    toast(error.message, "bad"); // what is painted stays; the next stroke or the fill sends it again
  }
});

async function checkHole(photo = editor.photo) {
  if (!photo || !holeFraction || !versions.chosen.length) return versions.warn([]);
  try {
    const { warnings } = await check(photo, versions.chosen, tileSize());
    if (photo === editor.photo) versions.warn(warnings);
  } catch (error) {
    toast(error.message, "bad");
  }
}

function showHole() {
  byId("hole-percent").textContent = holeFraction ? `${percent(100 * holeFraction)} of the photograph` : "none yet";
  byId("save-mask").disabled = !holeFraction;
}

editor.addEventListener("mask", () => {
  listNotes(byId("mask-notes"), []);
  settle();
});
editor.addEventListener("lines", settle);

byId("load-mask").addEventListener("click", () => byId("mask-file").click());
byId("mask-file").addEventListener("change", async () => {
  const chosen = byId("mask-file").files[0];
  byId("mask-file").value = "";
  const { photo } = editor;
  if (!chosen || !photo) return;
  try {
    const name = encodeURIComponent(chosen.name);
    const found = await api("POST", `/api/photos/${photo.id}/mask-file`, chosen, { "X-File-Name": name });
    const image = await loadImage(`${found.mask}?t=${Date.now()}`);
    if (photo !== editor.photo) return;
    editor.loadMask(image);
    listNotes(byId("mask-notes"), [
      ...(found.warnings ?? []).map((text) => ({ text, kind: "warn" })),
      ...(found.notes ?? []).map((text) => ({ text })),
    ]);
  } catch (error) {
    toast(error.message, "bad");
  }
});

/** Save the mask as a file: first sent, so that the file is what a fill uses. */
async function saveMask() {
  try {
    await sync.send();
    const link = make("a", { href: `/api/photos/${editor.photo.id}/mask.png`, download: "mask.png" });
    link.click();
  } catch (error) {
    toast(error.message, "bad");
  }
}
byId("save-mask").addEventListener("click", saveMask);

// ---- versions

versions.addEventListener("change", () => checkHole());
versions.addEventListener("refused", (event) => {
  toast(event.detail);
  editor.say(event.detail);
});

/** Read the list of versions. Returns whether it is there. */
async function loadVersions() {
  try {
    await versions.load();
    byId("no-models").hidden = versions.all.length > 0;
    return true;
  } catch (error) {
    versions.fail(error.message);
    return false;
  }
}

/** The option "Largest tile", within its limits. */
function tileSize() {
  const { value, min, max } = byId("tile");
  return Math.min(Number(max), Math.max(Number(min), Math.round(Number(value)) || 512));
}

byId("tile").addEventListener("change", () => {
  byId("tile").value = String(tileSize());
  edges.refresh();
  checkHole();
});

/** List versions that were registered, promoted or removed elsewhere. */
async function watchVersions() {
  let seen = (await loadVersions()) ? document.body.dataset.snapshot : null;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
    if (document.hidden) continue;
    try {
      const { snapshot } = await api("GET", "/api/snapshot?section=try");
      if (snapshot !== seen && (await loadVersions())) seen = snapshot;
    } catch { /* the next question tries again */ }
  }
}

// ---- fill and result

function message(text) {
  byId("fill-message").textContent = text;
  byId("fill-message").hidden = !text;
}

async function fill() {
  if (filling.isRunning || byId("editor").dataset.mode !== "edit") return;
  if (!editor.photo) return;
  message("");
  if (!versions.chosen.length) return message("Choose a version first.");
  const { photo } = editor;
  const prepare = async () => {
    holeFraction = (await sync.send()) ?? holeFraction;
    showHole();
    if (!holeFraction) throw new Error("Paint the hole first: what it covers is filled.");
  };
  const request = {
    photo: photo.id, versions: [...versions.chosen], blend: byId("blend").checked, format: byId("format").value,
    max_tile_size: tileSize(),
  };
  try {
    const done = await filling.run(prepare, request);
    if (photo !== editor.photo) return;
    if (done) await showResult(done);
    else editor.say("The fill is cancelled.");
  } catch (error) {
    message(error.message);
  }
}

async function showResult(done) {
  const errors = done.versions.map(({ error }) => error);
  if (errors.every(Boolean)) return message(errors.join(" — "));
  await comparison.load(done);
  setMode("result");
  comparison.show();
  const slider = comparison.way === "slider";
  editor.say(slider ? "The result is there. Arrow keys move the divider." : "The results are there, side by side.");
  byId(slider ? "divider" : "back").focus({ preventScroll: true });
}

function setMode(mode) {
  byId("editor").dataset.mode = mode;
  byId("last-result").hidden = !comparison.results.length;
  byId("editor").scrollIntoView({ block: "start" }); // on a narrow screen the panel may have been in view
}

comparison.addEventListener("change", () => {
  const { current } = comparison;
  const link = byId("save-result");
  byId("continue").disabled = !current?.image;
  link.hidden = !current?.image;
  if (!current?.image) return;
  link.href = current.download;
  link.download = current.name;
  byId("save-mask-too").href = `/api/photos/${editor.photo.id}/mask.png`;
});

function back() {
  if (byId("editor").dataset.mode !== "result") return false;
  comparison.hide();
  setMode("edit");
  editor.stage.focus({ preventScroll: true });
  return true;
}

byId("fill").addEventListener("click", fill);
byId("back").addEventListener("click", back);
byId("last-result").addEventListener("click", () => {
  setMode("result");
  comparison.show();
});
byId("continue").addEventListener("click", () => {
  const { job, at } = comparison.current;
  open(() => api("POST", `/api/photos/from-result/${job}/${at}`), null, false); // the hole is filled: nothing is lost
});

// ---- keys and start

const editing = (action) => () => (byId("editor").dataset.mode === "edit" && editor.photo ? action() : false);
const tool = (name) => editing(() => editor.choose(name));
const pen = (name) => editing(() => (byId("edge-tools").hidden ? false : editor.choose(name)));
const shown = (action) => () => (editor.photo ? action() : false);
/** 1 to 4: the version shown in the result; 1 shows the photograph at 100 % before. */
const version = (at) => () => {
  if (byId("editor").dataset.mode === "result") return comparison.choose(at);
  return at === 0 && editor.photo ? commands["zoom-full"]() : false;
};

attachCrosshair(editor);
attachHand(editor);
attachShortcuts({
  b: tool("brush"), e: tool("eraser"), r: tool("box"), h: tool("pan"), p: pen("pen"), o: pen("rubber"),
  z: editing(commands.undo), "mod+z": editing(commands.undo),
  "shift+mod+z": editing(commands.redo), "mod+y": editing(commands.redo),
  "[": editing(() => editor.resize(-1)), "]": editing(() => editor.resize(1)), i: editing(commands.invert),
  "+": shown(commands["zoom-in"]), "=": shown(commands["zoom-in"]), "-": shown(commands["zoom-out"]),
  0: shown(commands.fit),
  1: version(0), 2: version(1), 3: version(2), 4: version(3),
  Enter: editing(fill), "?": () => commands.help(),
  Escape: () => editor.cancel() || filling.cancel() || back(),
});
attachSources(open);
showTool();
showHistory();
watchVersions();

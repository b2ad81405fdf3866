// Where a photograph comes from: a drop anywhere on the page, the clipboard, a file or a sample.

import { api, toast } from "./studio.js";
import { byId, make } from "./try-dom.js";

/**
 * @param {(load: () => Promise<object>, file: File | null) => void} open called with what loads the photograph
 */
export function attachSources(open) {
  const choose = byId("photo-file");
  byId("choose-photo").addEventListener("click", () => choose.click());
  byId("another").addEventListener("click", () => choose.click());
  choose.addEventListener("change", () => {
    if (choose.files[0]) take(choose.files[0]);
    choose.value = ""; // the same file can be chosen again
  });
  attachDrop(take);
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  showSamples(open);

  function take(file) {
    open(() => upload(file), file);
  }
}

/** Send a file; `frame` chooses the picture of a file that has several. */
export function upload(file, frame = null) {
  const query = frame === null ? "" : `?frame=${frame}`;
  const name = encodeURIComponent(file.name || "pasted.png");
  return api("POST", `/api/photos${query}`, file, { "X-File-Name": name });
}

function attachDrop(take) {
  const veil = byId("drop-veil");
  let depth = 0; // dragenter and dragleave are fired for each element that is crossed
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const mark = (on) => {
    if (!on) depth = 0;
    document.body.classList.toggle("dropping", on);
    veil.hidden = !on || byId("editor").hidden;
  };
  document.addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    depth += 1;
    mark(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (hasFiles(event) && --depth <= 0) mark(false);
  });
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(false);
    if (event.dataTransfer.files.length > 1) toast("One photograph at a time: the first one is opened.");
    take(event.dataTransfer.files[0]);
  });
}

async function showSamples(open) {
  let samples = [];
  try {
    samples = await api("GET", "/api/samples");
  } catch { /* a photograph of one's own is all it takes */ }
  const disabled = byId("choose-photo").disabled;
  byId("samples").replaceChildren(...samples.map(({ id, title, thumb }) => {
    const button = make("button", { type: "button", disabled },
      make("img", { src: thumb, alt: "", loading: "lazy" }), make("span", { textContent: title }));
    const load = () => api("POST", `/api/photos/sample/${encodeURIComponent(id)}`);
    button.addEventListener("click", () => open(load, null));
    return button;
  }));
  byId("samples-area").hidden = samples.length === 0;
}

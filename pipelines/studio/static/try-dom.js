// Small helpers of the Try page.

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. Text from outside is only ever set as text.
 * @param {string} tag
 * @param {Record<string, any>} properties such as className or textContent; names with "-" become attributes
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** An image, decoded once, so that drawing it does not stop the page. */
export async function loadImage(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new Error("The studio's picture cannot be shown: load the photograph again.");
  }
  return createImageBitmap(image);
}

/** Fill a list with notes; `kind` is "", "warn" or "bad". */
export function listNotes(list, notes) {
  list.replaceChildren(...notes.map(({ text, kind = "" }) => make("li", { className: kind, textContent: text })));
}

/** A percentage with one digit. */
export function percent(value) {
  return value > 0 && value < 0.1 ? "under 0.1\u00a0%" : `${value.toFixed(1)}\u00a0%`;
}

/** Seconds as a person says them. */
export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  return value < 90 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
}

/** Call `action` once it was quiet for `ms`. */
export function debounce(ms, action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, ms);
  };
}

/** Open a dialog; resolves to true if its accepting button was pressed. */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "accept"), { once: true });
  });
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    const outside = event.target === dialog;
    if (event.target.closest("[data-accept]")) dialog.close("accept");
    else if (outside || event.target.closest("[data-close]")) dialog.close("");
  });
}

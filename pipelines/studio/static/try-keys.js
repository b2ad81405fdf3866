// The keyboard: shortcuts on the whole page, and painting with a crosshair while the photograph has the focus.

/**
 * Shortcuts. `actions` maps a key as in the dialog of keys ("b", "mod+z", "shift+mod+z", "Enter") to a function that
 * returns false when it had nothing to do.
 */
export function attachShortcuts(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || document.querySelector("dialog[open]") || isTyping(event)) return;
    const action = actions[nameOf(event)];
    if (action && action(event) !== false) event.preventDefault();
  });
}

function nameOf(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const mod = event.ctrlKey || event.metaKey;
  if (event.altKey) return "";
  return `${mod && event.shiftKey ? "shift+" : ""}${mod ? "mod+" : ""}${key}`;
}

/** Whether the key belongs to the control that has the focus. */
function isTyping(event) {
  const { target, key } = event;
  if (target.closest("input:not([type=checkbox]):not([type=range]):not([type=radio]), select, textarea")) {
    return key !== "Escape";
  }
  const own = ["Enter", " ", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
  return own.includes(key) && target.closest("button, a, summary, input, [role=slider], label") !== null;
}

/**
 * The space bar held: the pointer pans, unless the focused photograph shows its crosshair (there it paints).
 * @param {import("./try-editor.js").Editor} editor
 */
export function attachHand(editor) {
  const set = (held) => {
    if (editor.handHeld === held) return;
    editor.handHeld = held;
    editor.refresh();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key !== " " || event.defaultPrevented || isTyping(event)) return;
    if (document.querySelector("dialog[open]") || !editor.photo) return;
    event.preventDefault(); // the page must not scroll
    set(true);
  });
  document.addEventListener("keyup", (event) => event.key === " " && set(false));
  window.addEventListener("blur", () => set(false));
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Painting by keys: arrows move a crosshair (Shift: faster, Alt: one pixel), space paints a dab, held with arrows a
 * stroke; with the box tool the first space sets a corner and the second one the opposite corner.
 * @param {import("./try-editor.js").Editor} editor
 */
export function attachCrosshair(editor) {
  const { stage } = editor;
  let announcing = 0;

  stage.addEventListener("keydown", (event) => {
    if (!editor.photo || event.target !== stage || event.ctrlKey || event.metaKey) return;
    if (ARROWS[event.key]) {
      event.preventDefault();
      if (editor.overlay) pan(...ARROWS[event.key]);
      else move(event, ...ARROWS[event.key]);
    } else if (event.key === " " && editor.crosshair && !editor.overlay) {
      event.preventDefault();
      if (!event.repeat) press();
    }
  });

  stage.addEventListener("keyup", (event) => {
    if (event.key !== " " || editor.tool === "box" || !editor.isPainting || !editor.crosshair) return;
    editor.finish();
    editor.say(editor.tool === "eraser" || editor.tool === "rubber" ? "Erased." : "Painted.");
  });

  stage.addEventListener("blur", () => {
    if (!editor.crosshair || !editor.isPainting) return;
    if (editor.tool === "box") editor.cancel();
    else editor.finish();
  });

  function pan(dx, dy) {
    editor.view.pan(-dx * 40, -dy * 40);
  }

  function move(event, dx, dy) {
    const step = event.altKey ? 1 : Math.max(1, Math.round(((event.shiftKey ? 5 : 1) * 10) / editor.view.scale));
    const { width, height } = editor.photo;
    const from = editor.crosshair ?? { x: Math.round(width / 2), y: Math.round(height / 2) };
    const x = Math.min(width, Math.max(0, from.x + dx * step));
    const y = Math.min(height, Math.max(0, from.y + dy * step));
    editor.showCrosshair({ x, y });
    editor.extend(x, y);
    clearTimeout(announcing); // only where the crosshair comes to rest
    announcing = setTimeout(() => announce(x, y), 350);
  }

  function announce(x, y) {
    const { width, height } = editor.photo;
    const where = editor.mask.has(x, y) ? "in the hole" : "outside the hole";
    editor.say(`${Math.round(x)}, ${Math.round(y)} of ${width} by ${height}, ${where}`);
  }

  function press() {
    const { x, y } = editor.crosshair;
    if (editor.tool === "pan") return;
    if (editor.tool === "box" && editor.isPainting) {
      editor.finish();
      editor.say("Box painted.");
      return;
    }
    editor.begin(x, y);
    if (editor.tool === "box") editor.say("First corner set. Move to the opposite corner and press space.");
  }
}

// What part of a photograph is shown and how large. One View is shared by all panes that show the same photograph,
// so that zoom and pan stay the same in each. Sizes of panes are in CSS pixels, positions in the photograph in its pixels.

const MAX_SCALE = 32;
const MARGIN = 12; // CSS pixels around a photograph that is fitted
const CRISP_SCALE = 3; // device pixels per pixel of the photograph from which pixels are drawn as squares

/** Scale and centre of what is shown; fires "change". */
export class View extends EventTarget {
  width = 1;
  height = 1;
  scale = 1;
  x = 0.5;
  y = 0.5;
  /** True until the user zooms or pans: a pane that changes its size is fitted again. */
  fitted = true;

  /** Begin with another photograph. */
  setPhoto(width, height) {
    Object.assign(this, { width, height, x: width / 2, y: height / 2, fitted: true });
  }

  /** The scale at which all of the photograph is seen in `pane`; small photographs are enlarged at most four times. */
  fitScale(pane) {
    const margin = Math.min(pane.width, pane.height) > 300 ? 2 * MARGIN : 0;
    return Math.min((pane.width - margin) / this.width, (pane.height - margin) / this.height, 4);
  }

  /** Show all of the photograph. */
  fit(pane) {
    if (!pane.width || !pane.height) return;
    Object.assign(this, { scale: this.fitScale(pane), x: this.width / 2, y: this.height / 2, fitted: true });
    this.dispatchEvent(new Event("change"));
  }

  /** Change the scale by `factor`; the pixel under (px, py) of the pane stays there (its middle by default). */
  zoom(pane, factor, px = pane.width / 2, py = pane.height / 2) {
    const fixed = this.toPhoto(pane, px, py);
    const least = Math.min(1, this.fitScale(pane) / 2);
    this.scale = Math.min(MAX_SCALE, Math.max(least, this.scale * factor));
    this.x = fixed.x - (px - pane.width / 2) / this.scale;
    this.y = fixed.y - (py - pane.height / 2) / this.scale;
    this.#moved();
  }

  /** Move the photograph by CSS pixels. */
  pan(dx, dy) {
    this.x -= dx / this.scale;
    this.y -= dy / this.scale;
    this.#moved();
  }

  /** Pan so far that a position of the photograph is seen, with a margin. */
  reveal(pane, x, y, margin = 24) {
    const { x: px, y: py } = this.toPane(pane, x, y);
    const dx = Math.max(0, margin - px) - Math.max(0, px - pane.width + margin);
    const dy = Math.max(0, margin - py) - Math.max(0, py - pane.height + margin);
    if (dx || dy) this.pan(dx, dy);
  }

  #moved() {
    this.x = Math.min(this.width, Math.max(0, this.x));
    this.y = Math.min(this.height, Math.max(0, this.y));
    this.fitted = false;
    this.dispatchEvent(new Event("change"));
  }

  /** Position in the photograph under (px, py) of a pane. */
  toPhoto(pane, px, py) {
    return { x: this.x + (px - pane.width / 2) / this.scale, y: this.y + (py - pane.height / 2) / this.scale };
  }

  /** Position in a pane of (x, y) of the photograph. */
  toPane(pane, x, y) {
    return { x: (x - this.x) * this.scale + pane.width / 2, y: (y - this.y) * this.scale + pane.height / 2 };
  }

  /** Let a canvas of `pane` be drawn on in pixels of the photograph. */
  transform(context, pane) {
    const scale = this.scale * pane.ratio;
    const origin = this.toPane(pane, 0, 0);
    context.setTransform(scale, 0, 0, scale, Math.round(origin.x * pane.ratio), Math.round(origin.y * pane.ratio));
  }

  /** Draw an image of the photograph's size, only the part that is seen; the context is transformed already. */
  draw(context, pane, image, quality = "medium") {
    const from = this.toPhoto(pane, 0, 0);
    const to = this.toPhoto(pane, pane.width, pane.height);
    const left = Math.max(0, Math.floor(from.x) - 1);
    const top = Math.max(0, Math.floor(from.y) - 1);
    const width = Math.min(this.width, Math.ceil(to.x) + 1) - left;
    const height = Math.min(this.height, Math.ceil(to.y) + 1) - top;
    if (width <= 0 || height <= 0) return;
    context.imageSmoothingEnabled = this.scale * pane.ratio < CRISP_SCALE;
    context.imageSmoothingQuality = quality;
    context.drawImage(image, left, top, width, height, left, top, width, height);
  }
}

/**
 * Strengthen thin lines that fade where the photograph is shown smaller: the canvas is drawn on itself until a line one
 * pixel wide is nearly opaque. Leaves the context without transform.
 */
export function strengthen(context, scale) {
  context.setTransform(1, 0, 0, 1, 0, 0);
  for (let shown = scale; shown < 1; shown *= 2) context.drawImage(context.canvas, 0, 0);
}

/** An element that shows a View on one or more canvases on top of each other; drawn at most once per frame. */
export class Pane {
  width = 0;
  height = 0;
  ratio = 1;
  #layers = [];
  #frame = 0;

  constructor(element, view) {
    this.element = element;
    this.view = view;
    this.observer = new ResizeObserver(() => this.#resize());
    this.observer.observe(element);
    this.onView = () => this.invalidate();
    view.addEventListener("change", this.onView);
  }

  /** Add a canvas. `paint(context, pane)` is called with the view's transform on a cleared canvas. */
  add(canvas, paint) {
    const layer = { canvas, context: canvas.getContext("2d"), paint, stale: true };
    this.#layers.push(layer);
    this.#size(layer);
    this.invalidate(layer);
    return layer;
  }

  /** Draw a layer again with the next frame; all layers by default. */
  invalidate(layer = null) {
    for (const each of layer ? [layer] : this.#layers) each.stale = true;
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  /** Position of a pointer event in the pane. */
  locate(event) {
    const box = this.element.getBoundingClientRect();
    return { px: event.clientX - box.left, py: event.clientY - box.top };
  }

  /** Stop watching the element and the view. */
  close() {
    this.observer.disconnect();
    this.view.removeEventListener("change", this.onView);
    cancelAnimationFrame(this.#frame);
  }

  #resize() {
    this.width = this.element.clientWidth;
    this.height = this.element.clientHeight;
    this.ratio = Math.min(window.devicePixelRatio || 1, 2);
    for (const layer of this.#layers) {
      this.#size(layer);
      layer.stale = true;
    }
    if (this.view.fitted) this.view.fit(this);
    this.#paint(); // at once: a new size clears a canvas, and waiting for the next frame would flash
  }

  #size({ canvas }) {
    canvas.width = Math.max(1, Math.round(this.width * this.ratio));
    canvas.height = Math.max(1, Math.round(this.height * this.ratio));
  }

  #paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (!this.width) return;
    for (const layer of this.#layers.filter((each) => each.stale)) {
      layer.stale = false;
      layer.context.setTransform(1, 0, 0, 1, 0, 0);
      layer.context.clearRect(0, 0, layer.canvas.width, layer.canvas.height);
      this.view.transform(layer.context, this);
      layer.paint(layer.context, this);
    }
  }
}

export const ERASER_END = 5; // the button of a pen's other end

/**
 * Pointers on a pane: two fingers zoom and pan, the middle button and the pan tool pan, all else goes to the tool. The
 * hand that holds a pen does nothing.
 * @param {Pane} pane
 * @param {{pans: (event) => boolean, start: Function, move: Function, end: Function, cancel: Function, hover: Function,
 *   wheel: Function}} tool `start(event)`, `move(events)`, `end()`, `cancel()`, `hover(event or null)`;
 *   `wheel(event)` returns true when it used the wheel
 */
export function attachPointers(pane, tool) {
  const { element, view } = pane;
  const touches = new Map(); // pointerId -> last position
  let drawing = null; // the event that began the stroke
  let panning = null;
  let pinched = false; // until all fingers are up

  element.addEventListener("pointerdown", (event) => {
    if (event.target.closest("[data-own-pointer]")) return;
    if (event.pointerType === "touch" && drawing?.pointerType === "pen") return;
    if (event.pointerType === "pen" && touches.size) { // the hand was there first
      letGo();
      touches.clear();
      pinched = false;
    }
    element.setPointerCapture(event.pointerId);
    if (event.pointerType === "touch") touches.set(event.pointerId, pane.locate(event));
    if (touches.size === 2) {
      letGo(); // the first finger was the start of a pinch
      pinched = true;
    } else if (touches.size > 2 || pinched) {
      return;
    } else if (event.button === 1 || (event.button === 0 && tool.pans(event))) {
      event.preventDefault();
      panning = { id: event.pointerId, ...pane.locate(event) };
      element.classList.add("grabbing");
    } else if ((event.button === 0 || event.button === ERASER_END) && drawing === null) {
      drawing = event;
      tool.start(event);
    }
  });

  /** End the stroke without painting it, or the panning. */
  function letGo() {
    if (drawing !== null) tool.cancel();
    drawing = panning = null;
  }

  element.addEventListener("pointermove", (event) => {
    if (touches.has(event.pointerId) && pinched) return pinch(event);
    if (panning?.id === event.pointerId) {
      const { px, py } = pane.locate(event);
      view.pan(px - panning.px, py - panning.py);
      Object.assign(panning, { px, py });
    } else if (drawing?.pointerId === event.pointerId) {
      const events = event.getCoalescedEvents?.() ?? [];
      tool.move(events.length ? events : [event]);
    }
    if (event.pointerType !== "touch") tool.hover(event);
  });

  /** Zoom and pan by what two fingers did since the last event. */
  function pinch(event) {
    const ids = [...touches.keys()].slice(0, 2);
    if (ids.length < 2 || !ids.includes(event.pointerId)) return;
    const other = touches.get(ids.find((id) => id !== event.pointerId));
    const before = touches.get(event.pointerId);
    const now = pane.locate(event);
    touches.set(event.pointerId, now);
    const distance = (a, b) => Math.max(1, Math.hypot(a.px - b.px, a.py - b.py));
    view.pan((now.px - before.px) / 2, (now.py - before.py) / 2);
    view.zoom(pane, distance(now, other) / distance(before, other), (now.px + other.px) / 2, (now.py + other.py) / 2);
  }

  const up = (event) => {
    touches.delete(event.pointerId);
    if (!touches.size) pinched = false;
    if (panning?.id === event.pointerId) panning = null;
    if (!panning) element.classList.remove("grabbing");
    if (drawing?.pointerId !== event.pointerId) return;
    drawing = null;
    if (event.type === "pointercancel") tool.cancel();
    else tool.end();
  };
  element.addEventListener("pointerup", up);
  element.addEventListener("pointercancel", up);
  element.addEventListener("pointerleave", () => tool.hover(null));

  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (!event.ctrlKey && !event.metaKey && tool.wheel(event)) return;
    const { px, py } = pane.locate(event);
    view.zoom(pane, 1.0015 ** -wheelPixels(event), px, py);
  }, { passive: false });
}

/** How far a wheel turned, in pixels, whatever unit the browser uses; trackpads' pinches are small and are amplified. */
export function wheelPixels(event) {
  const pixels = event.deltaY * (event.deltaMode === 1 ? 33 : event.deltaMode === 2 ? 400 : 1);
  return event.ctrlKey && Math.abs(pixels) < 40 ? pixels * 5 : pixels;
}

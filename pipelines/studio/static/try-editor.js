// The photograph, the hole on it and the tools: what a pointer or the keyboard paints.

import { History, PaintLayer } from "./try-layer.js";
import { ERASER_END, Pane, View, attachPointers, strengthen, wheelPixels } from "./try-view.js";

/** Rare in photographs, so that the hole is seen on any. */
export const HOLE_COLOUR = "#f0147f";
export const LINE_COLOUR = "#ffe92e";

const MIN_BRUSH = 1;
const MIN_PEN = 1;
const MAX_PEN = 4; // on a photograph with sides up to 1,000 pixels; in proportion on a larger one

/**
 * The stage. Fires "mask" and "lines" when a step changed them, "tool" when tool or size changed, "say" with a sentence
 * for a screen reader, and "shown" when another photograph is shown.
 */
export class Editor extends EventTarget {
  view = new View();
  history = new History();
  photo = null;
  tool = "brush";
  brush = 40;
  pen = 2;
  /** True while the space bar is held: the pointer pans. */
  handHeld = false;
  /** Position of the keyboard's crosshair in the photograph. */
  crosshair = null;
  /** Set by try-compare.js while a result is shown: paints over the photograph. */
  overlay = null;
  #stroke = null;
  #corner = null;

  /** @param {HTMLElement} stage with canvases [data-layer] */
  constructor(stage) {
    super();
    this.stage = stage;
    const canvas = (name) => stage.querySelector(`canvas[data-layer=${name}]`);
    this.pane = new Pane(stage, this.view);
    this.photoLayer = this.pane.add(canvas("photo"), (context) => this.#paintPhoto(context));
    this.mask = new PaintLayer(this.pane, canvas("mask"), HOLE_COLOUR, this.history);
    this.edgesCanvas = canvas("edges");
    this.lines = new PaintLayer(this.pane, canvas("lines"), LINE_COLOUR, this.history);
    // drawn edges count only inside the hole; outside they are hidden and left out of the upload, not lost
    const paintMask = this.mask.paint.bind(this.mask);
    this.mask.paint = (context) => this.overlay || paintMask(context);
    this.lines.paint = (context) => {
      if (this.overlay) return;
      PaintLayer.prototype.paint.call(this.lines, context);
      strengthen(context, this.view.scale * this.pane.ratio);
      this.#clipToHole(context);
    };
    this.cursor = stage.querySelector(".cursor");
    this.cross = stage.querySelector(".crosshair");
    this.boxPreview = stage.querySelector(".box-preview");
    this.view.addEventListener("change", () => this.#placeMarks());
    attachPointers(this.pane, {
      pans: (event) => this.handHeld || this.overlay || this.tool === "pan" || event.shiftKey,
      start: (event) => this.#start(event),
      move: (events) => this.#move(events),
      end: () => this.finish(),
      cancel: () => this.cancel(),
      hover: (event) => this.#hover(event),
      wheel: (event) => this.#wheel(event),
    });
  }

  /** Show a photograph with an empty hole. */
  show(photo, image) {
    Object.assign(this, { photo, image, crosshair: null });
    this.#stroke = this.#corner = null;
    this.view.setPhoto(photo.width, photo.height);
    this.mask.reset(photo.width, photo.height);
    this.lines.reset(photo.width, photo.height);
    this.emptyLines = this.lines.revision;
    this.history.clear();
    this.pen = this.maxPen / 2;
    this.brush = Math.max(8, Math.round(Math.min(photo.width, photo.height) / 12));
    this.view.fit(this.pane);
    this.pane.invalidate();
    this.#emit("shown");
    this.#emit("tool");
  }

  get maxBrush() {
    return Math.max(64, Math.round(Math.min(this.photo?.width ?? 512, this.photo?.height ?? 512) / 2));
  }

  get maxPen() {
    return MAX_PEN * Math.max(1, Math.round(Math.min(this.photo?.width ?? 0, this.photo?.height ?? 0) / 1000));
  }

  get isPen() {
    return this.tool === "pen" || this.tool === "rubber";
  }

  /** Whether edges were drawn on this photograph. */
  get hasLines() {
    return this.lines.revision > this.emptyLines;
  }

  /** Diameter of the present tool in pixels of the photograph. */
  get size() {
    return this.isPen ? this.pen : this.brush;
  }

  set size(value) {
    const size = Math.round(Number(value) || 1);
    if (this.isPen) this.pen = Math.min(this.maxPen, Math.max(MIN_PEN, size));
    else this.brush = Math.min(this.maxBrush, Math.max(MIN_BRUSH, size));
    this.#placeMarks();
    this.#emit("tool");
  }

  /** Make the tool larger (steps > 0) or smaller. */
  resize(steps) {
    const next = Math.round(this.size * 1.12 ** steps);
    this.size = next === this.size ? this.size + Math.sign(steps) : next;
  }

  choose(tool) {
    this.cancel();
    this.tool = tool;
    this.#placeMarks();
    this.#emit("tool");
  }

  undo() { this.#back(() => this.history.undo()); }
  redo() { this.#back(() => this.history.redo()); }

  #back(step) {
    this.cancel();
    step();
    this.pane.invalidate(this.lines.onScreen);
    this.#emit("mask");
    this.#emit("lines");
  }

  clear() { this.#change(() => this.mask.clear(), "The hole is cleared."); }
  invert() { this.#change(() => this.mask.invert(), "The hole is inverted."); }

  loadMask(image) {
    this.#change(() => this.mask.load(image, (red, alpha) => alpha > 127 && red > 127), "The mask is loaded.");
  }

  #change(change, sentence) {
    this.cancel();
    change();
    this.pane.invalidate(this.lines.onScreen);
    this.#emit("mask");
    this.say(sentence);
  }

  clearLines() {
    this.cancel();
    this.lines.clear();
    this.#emit("lines");
  }

  loadLines(image) {
    this.cancel();
    this.lines.load(image, (_red, alpha) => alpha > 127);
    this.#emit("lines");
  }

  /** Tell a screen reader. */
  say(sentence) {
    this.dispatchEvent(new CustomEvent("say", { detail: sentence }));
  }

  // ---- painting, by pointer or keyboard; positions are in the photograph

  /** Begin a stroke or a box. `erase` turns a painting tool into its eraser. */
  begin(x, y, erase = false) {
    if (this.tool === "box") {
      this.#corner = { x, y, erase };
      this.#previewBox(x, y);
      return;
    }
    const layer = this.isPen ? this.lines : this.mask;
    const erases = erase || this.tool === "eraser" || this.tool === "rubber";
    this.#stroke = { layer, erase: erases, x, y, middle: { x, y } };
    this.extend(x, y);
  }

  /** Continue the stroke; a curve through the middles of the pointer's positions makes it smooth. */
  extend(x, y) {
    if (this.#corner) return this.#previewBox(x, y);
    const stroke = this.#stroke;
    if (!stroke) return;
    const from = stroke.middle;
    const middle = { x: (stroke.x + x) / 2, y: (stroke.y + y) / 2 };
    this.#paint((context) => {
      context.moveTo(from.x, from.y);
      // a line of no length is not drawn
      if (middle.x === from.x && middle.y === from.y) context.lineTo(from.x + 0.01, from.y);
      else context.quadraticCurveTo(stroke.x, stroke.y, middle.x, middle.y);
    }, [from, stroke, middle]);
    Object.assign(stroke, { x, y, middle });
  }

  /** End the stroke or the box. */
  finish() {
    if (this.#corner) return this.#finishBox();
    const stroke = this.#stroke;
    if (!stroke) return;
    this.#paint((context) => {
      context.moveTo(stroke.middle.x, stroke.middle.y);
      context.lineTo(stroke.x, stroke.y);
    }, [stroke.middle, stroke]);
    this.#stroke = null;
    this.history.commit();
    if (stroke.layer === this.mask) this.pane.invalidate(this.lines.onScreen);
    this.#emit(stroke.layer === this.mask ? "mask" : "lines");
  }

  /** Drop the stroke or box that is not finished. Returns whether there was one. */
  cancel() {
    const busy = Boolean(this.#stroke || this.#corner);
    this.#stroke = this.#corner = null;
    this.boxPreview.hidden = true;
    if (busy) this.history.cancel();
    return busy;
  }

  get isPainting() {
    return Boolean(this.#stroke || this.#corner);
  }

  #paint(trace, points) {
    const { layer, erase } = this.#stroke;
    const reach = this.size / 2 + 2;
    const xs = points.map((point) => point.x);
    const ys = points.map((point) => point.y);
    const box = {
      left: Math.min(...xs) - reach, top: Math.min(...ys) - reach,
      right: Math.max(...xs) + reach, bottom: Math.max(...ys) + reach,
    };
    layer.draw((context) => {
      context.lineWidth = this.size;
      context.beginPath();
      trace(context);
      context.stroke();
    }, box, erase);
    if (layer !== this.lines) return;
    // where the photograph is shown smaller, the next frame strengthens the line
    if (this.view.scale * this.pane.ratio < 1) this.pane.invalidate(layer.onScreen);
    else this.#clipToHole(layer.onScreen.context);
  }

  #clipToHole(context) {
    const canvas = this.mask.onScreen.canvas;
    if (this.mask.onScreen.stale) return this.pane.invalidate(this.lines.onScreen); // with the next frame
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalCompositeOperation = "destination-in";
    context.drawImage(canvas, 0, 0);
    context.globalCompositeOperation = "source-over";
  }

  #previewBox(x, y) {
    Object.assign(this.#corner, { toX: x, toY: y });
    const from = this.view.toPane(this.pane, this.#corner.x, this.#corner.y);
    const to = this.view.toPane(this.pane, x, y);
    const { style } = this.boxPreview;
    style.transform = `translate(${Math.min(from.x, to.x)}px, ${Math.min(from.y, to.y)}px)`;
    style.width = `${Math.abs(to.x - from.x)}px`;
    style.height = `${Math.abs(to.y - from.y)}px`;
    this.boxPreview.classList.toggle("erases", this.#corner.erase);
    this.boxPreview.hidden = false;
  }

  #finishBox() {
    const { x, y, toX, toY, erase } = this.#corner;
    this.#corner = null;
    this.boxPreview.hidden = true;
    const left = Math.max(0, Math.floor(Math.min(x, toX)));
    const top = Math.max(0, Math.floor(Math.min(y, toY)));
    const right = Math.min(this.photo.width, Math.ceil(Math.max(x, toX)));
    const bottom = Math.min(this.photo.height, Math.ceil(Math.max(y, toY)));
    if (right - left < 2 || bottom - top < 2) return;
    const fill = (context) => context.fillRect(left, top, right - left, bottom - top);
    this.mask.draw(fill, { left, top, right, bottom }, erase);
    this.history.commit();
    this.pane.invalidate(this.lines.onScreen);
    this.#emit("mask");
  }

  // ---- pointer

  #start(event) {
    if (!this.photo) return;
    this.showCrosshair(null);
    const { x, y } = this.#position(event);
    this.begin(x, y, event.altKey || event.button === ERASER_END);
    this.#hover(event);
  }

  #move(events) {
    for (const event of events) {
      const { x, y } = this.#position(event);
      this.extend(x, y);
    }
  }

  #position(event) {
    const { px, py } = this.pane.locate(event);
    return this.view.toPhoto(this.pane, px, py);
  }

  #hover(event) {
    this.pointer = event && event.pointerType !== "touch" ? this.pane.locate(event) : null;
    this.#placeMarks();
  }

  #wheel(event) {
    if (this.overlay || this.tool === "pan" || this.tool === "box") return false;
    this.wheelRest = (this.wheelRest ?? 0) - wheelPixels(event) / 50; // trackpads send many small turns
    const steps = Math.trunc(this.wheelRest);
    this.wheelRest -= steps;
    if (steps) this.resize(Math.max(-4, Math.min(4, steps)));
    return true;
  }

  // ---- cursor and crosshair

  /** Move the keyboard's crosshair, or hide it with null. */
  showCrosshair(position) {
    this.crosshair = position;
    if (position) this.view.reveal(this.pane, position.x, position.y);
    this.#placeMarks();
  }

  /** Draw cursor, crosshair and the kind of the mouse pointer for tool, size and zoom. */
  #placeMarks() {
    const hand = Boolean(this.handHeld || this.overlay || this.tool === "pan");
    this.stage.classList.toggle("hand", hand);
    this.stage.classList.toggle("boxing", !hand && this.tool === "box");
    const round = !hand && this.tool !== "box";
    this.cursor.hidden = !(round && this.pointer && this.photo);
    if (!this.cursor.hidden) place(this.cursor, this.pointer.px, this.pointer.py, this.size * this.view.scale);
    this.cross.hidden = !this.crosshair || Boolean(this.overlay);
    if (this.cross.hidden) return;
    const { x, y } = this.view.toPane(this.pane, this.crosshair.x, this.crosshair.y);
    place(this.cross, x, y, round ? this.size * this.view.scale : 0);
  }

  /** Update the marks after `handHeld` or `overlay` changed. */
  refresh() {
    this.#placeMarks();
    this.pane.invalidate();
  }

  #paintPhoto(context) {
    if (!this.photo) return;
    this.view.draw(context, this.pane, this.image);
    this.overlay?.(context, this.pane);
  }

  #emit(name) {
    this.dispatchEvent(new Event(name));
  }
}

/** Put a round mark of a diameter with its middle at a position of the stage. */
function place(element, x, y, diameter) {
  const size = Math.max(4, diameter);
  element.style.transform = `translate(${x}px, ${y}px)`;
  element.style.setProperty("--size", `${size}px`);
}

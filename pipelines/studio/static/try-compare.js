// The result: a slider over the photograph, or all versions side by side; what each version said.

import { byId, listNotes, loadImage, make, seconds } from "./try-dom.js";
import { Pane, attachPointers } from "./try-view.js";

/** Shows results on the editor's stage; fires "change" when another version is shown. */
export class Comparison extends EventTarget {
  results = [];
  index = 0;
  way = "slider";
  #panes = [];
  #gridSize = null; // the observer of the grid

  /** @param {import("./try-editor.js").Editor} editor */
  constructor(editor) {
    super();
    this.editor = editor;
    this.position = 0.5;
    this.divider = byId("divider");
    for (const button of document.querySelectorAll("[data-way]")) {
      button.addEventListener("click", () => this.show(button.dataset.way));
    }
    this.#attachDivider();
    editor.view.addEventListener("change", () => this.#placeDivider());
    new ResizeObserver(() => this.#placeDivider()).observe(editor.stage);
  }

  /** The result that is shown, with its position in the job. */
  get current() {
    return this.results[this.index];
  }

  /**
   * Load the images of a fill.
   * @param {{job: string, versions: object[]}} fill
   */
  async load({ job, versions }) {
    const images = await Promise.all(versions.map(({ view, error }) => (error || !view ? null : loadImage(view))));
    this.results = versions.map((each, at) => ({ ...each, job, at, image: images[at] }));
    this.index = Math.max(0, this.results.findIndex(({ image }) => image));
  }

  /** Enter the result: `way` is "slider" or "grid". */
  show(way = this.results.length > 1 ? "grid" : "slider") {
    this.way = way;
    for (const button of document.querySelectorAll("[data-way]")) {
      button.setAttribute("aria-pressed", String(button.dataset.way === way));
    }
    const slider = way === "slider";
    this.editor.overlay = (context, pane) => this.#paintResult(context, pane);
    this.editor.stage.hidden = !slider;
    byId("grid").hidden = slider;
    this.divider.hidden = byId("tag-left").hidden = byId("tag-right").hidden = !slider;
    this.#closeGrid();
    if (slider) this.editor.view.fit(this.editor.pane);
    else this.#openGrid();
    this.editor.refresh();
    this.#describe();
    requestAnimationFrame(() => this.#placeDivider());
  }

  /** Leave the result; the stage shows photograph and hole again. */
  hide() {
    this.editor.overlay = null;
    this.editor.stage.hidden = false;
    byId("grid").hidden = this.divider.hidden = byId("tag-left").hidden = byId("tag-right").hidden = true;
    const wasGrid = this.#panes.length > 0;
    this.#closeGrid();
    if (wasGrid) this.editor.view.fitted = true; // the stage fits it when it is seen again
    this.editor.refresh();
  }

  /** Show another version. */
  choose(index) {
    if (!this.results[index]?.image) return;
    this.index = index;
    this.#describe();
    this.editor.pane.invalidate();
  }

  /** The pane that zoom buttons work on. */
  get pane() {
    return this.#panes[0] ?? this.editor.pane;
  }

  #describe() {
    byId("tag-right").textContent = this.current ? nameOf(this.current) : "";
    const several = this.results.length > 1 && this.way === "slider";
    byId("shown").replaceChildren(...(several ? this.results : []).filter(({ image }) => image).map((result) => {
      const button = make("button", { type: "button", title: `Show ${nameOf(result)} (${result.at + 1})` },
        make("span", { textContent: nameOf(result) }));
      button.setAttribute("aria-pressed", String(result === this.current));
      button.addEventListener("click", () => this.choose(result.at));
      return button;
    }));
    byId("results").replaceChildren(...this.results.map((result) => this.#card(result)));
    for (const tag of byId("grid").querySelectorAll("[data-at]")) {
      tag.setAttribute("aria-pressed", String(Number(tag.dataset.at) === this.index));
    }
    const name = this.current ? nameOf(this.current) : "the result";
    this.divider.setAttribute("aria-label", `Divider between the photograph and ${name}`);
    this.dispatchEvent(new Event("change"));
  }

  #card(result) {
    const head = make("button", { type: "button", textContent: nameOf(result), disabled: !result.image });
    head.setAttribute("aria-pressed", String(result === this.current));
    head.addEventListener("click", () => this.choose(result.at));
    const notes = make("ul", { className: "notes" });
    listNotes(notes, [
      ...(result.error ? [{ text: result.error, kind: "bad" }] : []),
      ...(result.warnings ?? []).map((text) => ({ text, kind: "warn" })),
      ...(result.notes ?? []).map((text) => ({ text })),
    ]);
    const took = result.error ? "failed" : Number.isFinite(result.seconds) ? seconds(result.seconds) : "";
    return make("div", { className: `result ${result === this.current && this.results.length > 1 ? "current" : ""}` },
      make("div", { className: "result-head" }, head, make("span", { className: "soft", textContent: took })), notes);
  }

  // ---- slider

  /** The photograph's part of the stage, from left to right. */
  #span(pane) {
    const left = Math.max(0, this.editor.view.toPane(pane, 0, 0).x);
    const right = Math.min(pane.width, this.editor.view.toPane(pane, this.editor.photo.width, 0).x);
    return { left, right: Math.max(left, right) };
  }

  #paintResult(context, pane) {
    if (!this.current?.image) return;
    const { left, right } = this.#span(pane);
    const x = this.editor.view.toPhoto(pane, left + this.position * (right - left), 0).x;
    context.save();
    context.beginPath();
    context.rect(x, 0, this.editor.photo.width - x, this.editor.photo.height);
    context.clip();
    this.editor.view.draw(context, pane, this.current.image);
    context.restore();
  }

  #placeDivider() {
    if (this.divider.hidden || !this.editor.photo) return;
    const { left, right } = this.#span(this.editor.pane);
    this.divider.style.transform = `translateX(${left + this.position * (right - left)}px)`;
    const value = Math.round(100 * this.position);
    this.divider.setAttribute("aria-valuenow", String(value));
    this.divider.setAttribute("aria-valuetext", `${value} % photograph, ${100 - value} % result`);
  }

  #moveTo(position) {
    this.position = Math.min(1, Math.max(0, position));
    this.#placeDivider();
    this.editor.pane.invalidate(this.editor.photoLayer);
  }

  #attachDivider() {
    const { divider } = this;
    const drag = (event) => {
      const { left, right } = this.#span(this.editor.pane);
      const { px } = this.editor.pane.locate(event);
      this.#moveTo((px - left) / Math.max(1, right - left));
    };
    divider.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      divider.setPointerCapture(event.pointerId);
    });
    divider.addEventListener("pointermove", (event) => divider.hasPointerCapture(event.pointerId) && drag(event));
    divider.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 0.1 : 0.02;
      const to = {
        ArrowLeft: this.position - step, ArrowDown: this.position - step, ArrowRight: this.position + step,
        ArrowUp: this.position + step, PageDown: this.position - 0.1, PageUp: this.position + 0.1, Home: 0, End: 1,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.#moveTo(to);
    });
  }

  // ---- side by side

  #openGrid() {
    const { view, photo, image } = this.editor;
    const results = this.results.map((result) => ({ ...result, name: nameOf(result) }));
    const cells = [{ name: "Photograph", image }, ...results];
    const grid = byId("grid");
    this.#gridSize = new ResizeObserver(() => {
      grid.style.setProperty("--columns", String(this.#columns(grid, cells.length, photo)));
    });
    this.#gridSize.observe(grid);
    view.fitted = true;
    grid.replaceChildren(...cells.map((cell) => this.#cell(cell)));
  }

  /** The number of columns with which the photograph is largest. */
  #columns(grid, count, photo) {
    const width = grid.clientWidth || 1;
    const height = grid.clientHeight || 1;
    let best = { columns: 1, scale: 0 };
    for (let columns = 1; columns <= count; columns += 1) {
      const rows = Math.ceil(count / columns);
      const scale = Math.min(width / columns / photo.width, height / rows / photo.height);
      if (scale > best.scale) best = { columns, scale };
    }
    return best.columns;
  }

  #cell({ name, image, error, at }) {
    const tag = make(at === undefined ? "div" : "button", { className: "tag left", textContent: name });
    if (at !== undefined) {
      Object.assign(tag, { type: "button", disabled: !image, title: "Choose for the download and the slider" });
      tag.dataset.ownPointer = tag.dataset.at = String(at);
      tag.addEventListener("click", () => this.choose(at));
    }
    if (!image) {
      return make("div", { className: "stage failed" }, make("p", { textContent: error ?? "No result" }), tag);
    }
    const canvas = make("canvas", { role: "img", "aria-label": name });
    const cell = make("div", { className: "stage hand" }, canvas, tag);
    const pane = new Pane(cell, this.editor.view);
    pane.add(canvas, (context) => this.editor.view.draw(context, pane, image));
    const nothing = () => {};
    attachPointers(pane, {
      pans: () => true, wheel: () => false,
      start: nothing, move: nothing, end: nothing, cancel: nothing, hover: nothing,
    });
    this.#panes.push(pane);
    return cell;
  }

  #closeGrid() {
    for (const pane of this.#panes) pane.close();
    this.#panes = [];
    this.#gridSize?.disconnect();
    byId("grid").replaceChildren();
  }
}

function nameOf({ version }) {
  const [name, number] = version.split(/\/(?=[^/]*$)/);
  return number ? `${name} v${number}` : version;
}

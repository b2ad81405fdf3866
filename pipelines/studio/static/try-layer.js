// Layers to paint on at the photograph's size (the hole, the drawn edges), and undo for all of them.

const TILE = 256;
const UNDO_BYTES = 192 * 2 ** 20;
const STRIP = 256; // rows that are read from a canvas at a time: large photographs must not block the page

/**
 * A layer of one colour. What is painted goes to a canvas at the photograph's size and, at once, to the canvas on the
 * screen: a stroke on a photograph of 24 megapixels costs no more than what is seen of it.
 */
export class PaintLayer {
  /** Counts changes. */
  revision = 0;

  constructor(pane, canvas, colour, history) {
    Object.assign(this, { pane, colour, history });
    this.full = document.createElement("canvas");
    this.context = this.full.getContext("2d", { willReadFrequently: true });
    this.onScreen = pane.add(canvas, (context) => this.paint(context));
    this.reset(1, 1);
  }

  /** Begin empty at another size. */
  reset(width, height) {
    this.full.width = width;
    this.full.height = height;
    this.changed();
  }

  /** Note a change and draw the layer again. */
  changed() {
    this.revision += 1;
    this.pane.invalidate(this.onScreen);
  }

  paint(context) {
    this.pane.view.draw(context, this.pane, this.full, this.pane.view.scale < 1 ? "medium" : "low");
  }

  /**
   * Paint or erase what `path(context)` draws, within `box` {left, top, right, bottom}; kept for undo.
   * @param {(context: CanvasRenderingContext2D) => void} path strokes or fills with the style that is set
   */
  draw(path, box, erase = false) {
    this.history.keep(this, box);
    this.pane.view.transform(this.onScreen.context, this.pane);
    for (const context of [this.context, this.onScreen.context]) {
      context.globalCompositeOperation = erase ? "destination-out" : "source-over";
      context.fillStyle = context.strokeStyle = this.colour;
      context.lineCap = context.lineJoin = "round";
      path(context);
      context.globalCompositeOperation = "source-over";
    }
    this.revision += 1;
  }

  /** Change all of the layer by `change(context)` as one step of undo. */
  replace(change) {
    this.history.keep(this, { left: 0, top: 0, right: this.full.width, bottom: this.full.height });
    this.context.fillStyle = this.colour;
    change(this.context);
    this.context.globalCompositeOperation = "source-over";
    this.history.commit();
    this.changed();
  }

  clear() {
    this.replace((context) => context.clearRect(0, 0, this.full.width, this.full.height));
  }

  invert() {
    this.replace((context) => {
      context.globalCompositeOperation = "source-out";
      context.fillRect(0, 0, this.full.width, this.full.height);
    });
  }

  /** Take over an image whose `chosen(red, alpha)` pixels become painted. */
  load(image, chosen) {
    const { width, height } = this.full;
    const scratch = document.createElement("canvas");
    scratch.width = width;
    const reader = scratch.getContext("2d", { willReadFrequently: true });
    const [red, green, blue] = channels(this.colour);
    this.replace((context) => {
      for (let top = 0; top < height; top += STRIP) {
        const rows = Math.min(STRIP, height - top);
        scratch.height = rows; // clears it
        reader.drawImage(image, 0, -top);
        const pixels = reader.getImageData(0, 0, width, rows);
        const { data } = pixels;
        for (let at = 0; at < data.length; at += 4) {
          const alpha = chosen(data[at], data[at + 3]) ? 255 : 0;
          data[at] = red; data[at + 1] = green; data[at + 2] = blue; data[at + 3] = alpha;
        }
        context.putImageData(pixels, 0, top);
      }
    });
  }

  /** Whether the layer is painted at a position. */
  has(x, y) {
    const inside = x >= 0 && y >= 0 && x < this.full.width && y < this.full.height;
    return inside && this.context.getImageData(Math.floor(x), Math.floor(y), 1, 1).data[3] >= 128;
  }

  /**
   * The layer as a PNG, white on black without grey levels, and the part that is white.
   * @param {PaintLayer | null} within only what is also painted on this layer
   * @returns {Promise<{blob: Blob, fraction: number}>}
   */
  async export(within = null) {
    const { width, height } = this.full;
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    let painted = 0;
    for (let top = 0; top < height; top += STRIP) {
      const rows = Math.min(STRIP, height - top);
      const pixels = this.context.getImageData(0, top, width, rows);
      const other = within && new Uint32Array(within.context.getImageData(0, top, width, rows).data.buffer);
      const words = new Uint32Array(pixels.data.buffer); // alpha is the highest byte
      for (let at = 0; at < words.length; at += 1) {
        const on = words[at] >>> 31 && (!other || other[at] >>> 31);
        words[at] = on ? 0xffffffff : 0xff000000;
        painted += on ? 1 : 0;
      }
      context.putImageData(pixels, 0, top);
      if (height > 4 * STRIP) await new Promise((resolve) => setTimeout(resolve)); // let the page answer
    }
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    return { blob, fraction: painted / (width * height) };
  }
}

function channels(colour) {
  const value = parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/** Undo and redo by the tiles that a step changed, with a limit in bytes; fires "change". */
export class History extends EventTarget {
  #undo = [];
  #redo = [];
  #open = null; // the step being painted: key -> {layer, left, top, width, height, alpha}

  get canUndo() { return this.#undo.length > 0; }
  get canRedo() { return this.#redo.length > 0; }

  /** Keep the tiles in `box` as they are, before the present step changes them. */
  keep(layer, box) {
    this.#open ??= new Map();
    const { width, height } = layer.full;
    const last = (value, size) => Math.min(Math.ceil(value), size);
    for (let top = tileStart(box.top); top < last(box.bottom, height); top += TILE) {
      for (let left = tileStart(box.left); left < last(box.right, width); left += TILE) {
        const key = `${layer.colour} ${left} ${top}`;
        if (!this.#open.has(key)) this.#open.set(key, readTile(layer, left, top));
      }
    }
  }

  /** End the present step: the next undo takes it back. */
  commit() {
    if (this.#open?.size) {
      this.#undo.push([...this.#open.values()]);
      this.#redo = [];
      while (this.#undo.length > 1 && bytes(this.#undo) > UNDO_BYTES) this.#undo.shift();
    }
    this.#open = null;
    this.dispatchEvent(new Event("change"));
  }

  /** Take back the present step, which is not kept for redo. */
  cancel() {
    if (this.#open) swap([...this.#open.values()]);
    this.#open = null;
  }

  undo() { this.#step(this.#undo, this.#redo); }
  redo() { this.#step(this.#redo, this.#undo); }

  /** Forget all steps. */
  clear() {
    this.#undo = [];
    this.#redo = [];
    this.#open = null;
    this.dispatchEvent(new Event("change"));
  }

  #step(from, to) {
    this.cancel();
    const step = from.pop();
    if (step) to.push(swap(step));
    this.dispatchEvent(new Event("change"));
  }
}

const tileStart = (value) => Math.max(0, Math.floor(value / TILE) * TILE);
const bytes = (steps) => steps.flat().reduce((sum, tile) => sum + tile.alpha.length, 0);

/** A tile's opacity, one byte per pixel: the layer has one colour. */
function readTile(layer, left, top) {
  const width = Math.min(TILE, layer.full.width - left);
  const height = Math.min(TILE, layer.full.height - top);
  const { data } = layer.context.getImageData(left, top, width, height);
  const alpha = new Uint8Array(width * height);
  for (let at = 0; at < alpha.length; at += 1) alpha[at] = data[4 * at + 3];
  return { layer, left, top, width, height, alpha };
}

/** Put tiles back; returns those that were there. */
function swap(tiles) {
  const present = tiles.map(({ layer, left, top }) => readTile(layer, left, top));
  for (const { layer, left, top, width, height, alpha } of tiles) {
    const [red, green, blue] = channels(layer.colour);
    const pixels = new ImageData(width, height);
    const { data } = pixels;
    for (let at = 0; at < alpha.length; at += 1) {
      data[4 * at] = red; data[4 * at + 1] = green; data[4 * at + 2] = blue; data[4 * at + 3] = alpha[at];
    }
    layer.context.putImageData(pixels, left, top);
  }
  for (const layer of new Set(tiles.map((tile) => tile.layer))) layer.changed();
  return present;
}

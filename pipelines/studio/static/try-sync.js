// Keeps the studio's copy of the hole and of the drawn edges up to date, and asks it what it thinks of the hole.

import { api } from "./studio.js";

/** Uploads what changed, one request after another; the newest state wins. */
export class Sync {
  #sent = { photo: null, mask: -1, lines: -1 };
  #running = Promise.resolve();

  /** Called with the hole's part of the photograph before it is sent. */
  onMeasured = null;

  /** @param {import("./try-editor.js").Editor} editor */
  constructor(editor) {
    this.editor = editor;
  }

  /**
   * Send mask and lines if they changed since they were sent. Throws the studio's error; nothing painted is lost by it.
   * @returns {Promise<number | null>} the hole's part of the photograph, or null when another photograph came
   */
  send() {
    const next = this.#running.catch(() => {}).then(() => this.#send());
    this.#running = next;
    return next;
  }

  async #send() {
    const { editor } = this;
    const { photo, mask, lines } = editor;
    if (!photo) return null;
    if (this.#sent.photo !== photo.id) {
      this.#sent = { photo: photo.id, mask: -1, lines: -1, fraction: 0, hadLines: false };
    }
    const sent = this.#sent;
    const maskRevision = mask.revision;
    if (sent.mask !== maskRevision) {
      const { blob, fraction } = await mask.export();
      this.onMeasured?.(fraction);
      await api("PUT", `/api/photos/${photo.id}/mask`, blob);
      Object.assign(sent, { mask: maskRevision, fraction, lines: -1 }); // the lines are cut to the hole
    }
    const linesRevision = lines.revision;
    if (sent.lines !== linesRevision) {
      await this.#sendLines(photo, sent);
      sent.lines = linesRevision;
    }
    return editor.photo === photo ? sent.fraction : null;
  }

  async #sendLines(photo, sent) {
    if (!this.editor.hasLines && !sent.hadLines) return;
    const { blob, fraction } = await this.editor.lines.export(this.editor.mask);
    await api("PUT", `/api/photos/${photo.id}/lines`, fraction ? blob : new Blob([]));
    sent.hadLines = fraction > 0;
  }
}

/** What the studio says of the hole for the chosen versions: {hole_percent, tiles, warnings}. */
export function check(photo, versions, tileSize) {
  return api("POST", `/api/photos/${photo.id}/checks`, { versions, max_tile_size: tileSize });
}

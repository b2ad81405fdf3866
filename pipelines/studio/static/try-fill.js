// One fill: the job with its progress, its ETA and Cancel.

import { api, follow } from "./studio.js";
import { byId, seconds } from "./try-dom.js";

/** Runs one fill at a time; the panel's foot shows how far it is. */
export class Filling {
  #job = null;
  #stopped = false;

  constructor() {
    byId("cancel-fill").addEventListener("click", () => this.cancel());
  }

  get isRunning() {
    return !byId("working").hidden;
  }

  /**
   * Fill; `prepare()` uploads what is needed first.
   * @returns {Promise<{job: string, versions: object[]} | null>} null when it was cancelled; throws the error's line
   */
  async run(prepare, request) {
    this.#stopped = false;
    this.#job = null;
    this.#busy(true);
    this.#progress({ done: 0, total: 0, note: "Sending the hole" });
    try {
      await prepare();
      if (this.#stopped) return null;
      const { id } = await api("POST", "/api/fills", request);
      this.#job = id;
      if (this.#stopped) this.#tellStudio();
      const job = await follow(id, (each) => this.#progress(each));
      return job.state === "cancelled" ? null : { job: id, versions: job.result.versions };
    } catch (error) {
      if (this.#stopped) return null;
      throw error;
    } finally {
      this.#busy(false);
    }
  }

  /** Cancel the fill. Returns false when none runs. */
  cancel() {
    if (!this.isRunning) return false;
    this.#stopped = true;
    byId("cancel-fill").disabled = true;
    byId("fill-note").textContent = "Cancelling";
    byId("fill-eta").textContent = "";
    if (this.#job) this.#tellStudio();
    return true;
  }

  #tellStudio() {
    api("POST", `/api/jobs/${this.#job}/cancel`).catch(() => {}); // `follow` reports a studio that is gone
  }

  #busy(on) {
    byId("working").hidden = byId("cancel-fill").hidden = !on;
    byId("cancel-fill").disabled = false;
    byId("fill").disabled = on;
    byId("fill").textContent = on ? "Filling …" : "Fill";
  }

  #progress({ state, done, total, note, eta_seconds: eta }) {
    if (this.#stopped) return;
    const bar = byId("fill-progress");
    if (total) bar.value = done / total;
    else bar.removeAttribute("value");
    byId("fill-note").textContent = state === "waiting" ? "Waiting for the worker" : note || "Filling";
    byId("fill-eta").textContent = eta ? `${seconds(eta)} left` : "";
  }
}

// The list of versions, and the one to four that are chosen. Hundreds of versions stay quick: few rows are drawn.

import { api } from "./studio.js";
import { byId, debounce, listNotes, make } from "./try-dom.js";

const MOST = 4;
const NEWEST = 3; // of each model, besides those with an alias, until all are asked for
const FOUND = 12; // of each model that the filter finds
const MOST_FOUND = 60; // of all models
const REMEMBERED = "inpaint.versions";

/** Fires "change" when other versions are chosen or their details are there, "refused" when a fifth is chosen. */
export class Versions extends EventTarget {
  all = [];
  chosen = []; // ids
  #details = new Map();
  #open = new Set(); // names of models whose versions are all listed
  #warnings = [];

  constructor() {
    super();
    const filter = byId("version-filter");
    filter.addEventListener("input", debounce(80, () => this.#list()));
    byId("version-list").addEventListener("change", (event) => this.#toggle(event.target));
  }

  /** Read the list; remembered versions are chosen again, else the first one. */
  async load() {
    this.all = await api("GET", "/api/versions");
    const known = new Set(this.all.map(({ id }) => id));
    const wanted = new URLSearchParams(location.search).getAll("version"); // a link from a model's page
    const before = [this.chosen, wanted, remembered()].map((ids) => ids.filter((id) => known.has(id)));
    this.chosen = [...new Set(before.find((ids) => ids.length) ?? [])].slice(0, MOST);
    if (!this.chosen.length && this.all.length) this.chosen = [byRank(this.all)[0].id];
    this.#list();
    await this.#changed();
  }

  /** Say that the list cannot be read; what was chosen stays. */
  fail(sentence) {
    const note = make("p", { className: "small", textContent: sentence });
    if (!this.all.length) byId("version-list").replaceChildren(note);
  }

  /** What is known of a version: the list's entry, and once it is read what the model's file says. */
  detail(id) {
    const listed = this.all.find((each) => each.id === id);
    return { ...listed, ...this.#details.get(id), aliases: listed?.aliases ?? [] }; // aliases move
  }

  /** Show warnings [{version, text}] beside their versions. */
  warn(warnings) {
    this.#warnings = warnings;
    this.#showChosen();
  }

  #toggle(box) {
    const id = box.dataset.version;
    if (!id) return;
    if (box.checked && this.chosen.length >= MOST) {
      box.checked = false;
      const detail = `At most ${MOST} versions are compared: remove one first.`;
      this.dispatchEvent(new CustomEvent("refused", { detail }));
      return;
    }
    this.chosen = box.checked ? [...this.chosen, id] : this.chosen.filter((each) => each !== id);
    this.#changed();
  }

  #remove(id) {
    this.chosen = this.chosen.filter((each) => each !== id);
    this.#list();
    this.#changed();
    const box = byId("version-list").querySelector(`[data-version="${CSS.escape(id)}"]`);
    (box ?? byId("version-filter")).focus({ preventScroll: true });
  }

  async #changed() {
    remember(this.chosen);
    this.#warnings = this.#warnings.filter(({ version }) => this.chosen.includes(version));
    this.#showChosen();
    this.dispatchEvent(new Event("change"));
    const missing = this.chosen.filter((id) => !this.#details.has(id));
    if (!missing.length) return;
    await Promise.all(missing.map((id) => this.#read(id)));
    this.#showChosen();
    this.dispatchEvent(new Event("change"));
  }

  async #read(id) {
    const { name, version } = this.detail(id);
    try {
      const found = await api("GET", `/api/versions/${encodeURIComponent(name)}/${encodeURIComponent(version)}`);
      this.#details.set(id, { ...this.detail(id), ...found, id });
    } catch (error) {
      this.#details.set(id, { ...this.detail(id), error: error.message });
    }
  }

  #showChosen() {
    const { length } = this.chosen;
    byId("chosen-count").textContent = length ? `${length} of at most ${MOST}` : "none chosen";
    byId("chosen").replaceChildren(...this.chosen.map((id) => this.#card(this.detail(id))));
  }

  #card(version) {
    const remove = make("button", { type: "button", textContent: "×", title: "Remove" });
    remove.setAttribute("aria-label", `Remove ${title(version)}`);
    remove.addEventListener("click", () => this.#remove(version.id));
    const notes = make("ul", { className: "notes" });
    const warnings = this.#warnings.filter((warning) => warning.version === version.id);
    listNotes(notes, [
      ...(version.error ? [{ text: version.error, kind: "bad" }] : []),
      ...warnings.map(({ text }) => ({ text, kind: "warn" })),
    ]);
    const head = make("div", { className: "choice-head" },
      make("strong", { textContent: title(version), title: title(version) }), ...chips(version), remove);
    return make("div", { className: "choice" }, head, make("p", { textContent: trained(version) }), notes);
  }

  #list() {
    const words = byId("version-filter").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const groups = new Map();
    for (const version of this.all) {
      if (!words.every((word) => text(version).includes(word))) continue;
      if (!groups.has(version.name)) groups.set(version.name, []);
      groups.get(version.name).push(version);
    }
    let room = MOST_FOUND;
    const parts = [];
    for (const [name, found] of groups) {
      const ranked = byRank(found);
      const shown = this.#open.has(name) ? ranked : this.#few(ranked, words.length > 0).slice(0, room);
      room = Math.max(0, room - shown.length);
      if (!shown.length) continue;
      parts.push(make("h3", { textContent: name }), ...shown.map((version) => this.#row(version)));
      if (shown.length < ranked.length) parts.push(this.#more(name, ranked.length));
    }
    if (!parts.length) {
      const none = words.length ? "No version matches." : "No model is registered.";
      parts.push(make("p", { className: "soft small", textContent: none }));
    }
    const focused = document.activeElement?.dataset.version; // is kept when the list is read again
    byId("version-list").replaceChildren(...parts);
    if (focused) byId("version-list").querySelector(`[data-version="${CSS.escape(focused)}"]`)?.focus();
  }

  /** The versions of a model that are listed until all are asked for. */
  #few(ranked, isFound) {
    if (isFound) return ranked.slice(0, FOUND);
    return ranked.filter(({ id, aliases }, at) => aliases.length || at < NEWEST || this.chosen.includes(id));
  }

  #row(version) {
    const checked = this.chosen.includes(version.id);
    const box = make("input", { type: "checkbox", checked, "data-version": version.id });
    box.setAttribute("aria-label", `${title(version)} ${version.aliases.join(" ")}`.trim());
    return make("label", { className: "version" }, box, make("span", { textContent: `v${version.version}` }),
      make("span", { className: "chips" }, ...chips(version)),
      make("span", { className: "about", textContent: about(version) }));
  }

  #more(name, count) {
    const button = make("button", { type: "button", className: "more", textContent: `All ${count} versions` });
    button.setAttribute("aria-label", `Show all ${count} versions of ${name}`);
    button.addEventListener("click", () => {
      this.#open.add(name);
      this.#list();
    });
    return button;
  }
}

/** Name and version as shown. */
export const title = ({ name, version }) => `${name} v${version}`;

const text = (version) =>
  [version.name, `v${version.version}`, version.model ?? "", ...version.aliases].join(" ").toLowerCase();

function byRank(versions) {
  const rank = ({ aliases }) => {
    const known = ["champion", "candidate"].findIndex((alias) => aliases.includes(alias));
    return known >= 0 ? known : aliases.length ? 2 : 3;
  };
  return [...versions].sort((a, b) => rank(a) - rank(b)); // the sort is stable: newest first within a rank
}

function chips({ aliases }) {
  return aliases.map((alias) => make("span", {
    className: `chip ${alias === "champion" ? "good" : "accent"}`, textContent: alias,
  }));
}

function about({ size, sigma, created }) {
  const parts = [];
  if (size) parts.push(`${size} px`);
  if (sigma) parts.push(`σ ${sigma}`);
  const day = shortDate(created);
  if (day) parts.push(day);
  return parts.join(" · ");
}

function shortDate(created) {
  const date = new Date(typeof created === "number" && created < 1e11 ? created * 1000 : created);
  if (!created || Number.isNaN(date.valueOf())) return "";
  return date.toLocaleDateString(undefined, { day: "numeric", month: "short" });
}

/** What a version was trained on, in one line. */
function trained({ model, size, sigma, needs_edges: needsEdges, takes_edges: takesEdges, masks, hole_range: range }) {
  const parts = [];
  if (size) parts.push(`${size}\u00a0×\u00a0${size}\u00a0px`);
  if (range) {
    const [low, high] = range.map((fraction) => Math.round(100 * fraction));
    parts.push(`holes of ${low === high ? low : `${low} to ${high}`}\u00a0%`);
  }
  if (masks?.length) parts.push(`${[masks].flat().join(", ")} masks`);
  if (sigma && (needsEdges || takesEdges)) parts.push(`edges at σ\u00a0${sigma}`);
  if (!parts.length) return model ?? "";
  return `Trained on ${parts.join(", ")}`;
}

function remembered() {
  try {
    const ids = JSON.parse(localStorage.getItem(REMEMBERED) ?? "[]");
    return Array.isArray(ids) ? ids : [];
  } catch {
    return []; // storage is switched off, or holds something else
  }
}

function remember(ids) {
  try {
    localStorage.setItem(REMEMBERED, JSON.stringify(ids));
  } catch { /* storage is switched off or full: nothing is lost but the memory */ }
}

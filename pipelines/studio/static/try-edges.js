// Edges: the known ones around the hole as a model sees them, and lines drawn in the hole.

import { toast } from "./studio.js";
import { byId, loadImage, make } from "./try-dom.js";
import { strengthen } from "./try-view.js";
import { title } from "./try-versions.js";

const KNOWN_COLOUR = "#00e0ff";

/**
 * The panel "Edges". It is shown when a chosen version takes edges.
 * @param {import("./try-editor.js").Editor} editor
 * @param {import("./try-versions.js").Versions} versions
 * @param {import("./try-sync.js").Sync} sync
 */
export function attachEdges(editor, versions, sync) {
  const show = byId("show-edges");
  const select = byId("edges-of");
  let known = null; // the edges' image, recoloured
  let asked = 0;

  const layer = editor.pane.add(editor.edgesCanvas, (context, pane) => {
    if (!known || !show.checked || editor.overlay) return;
    editor.view.draw(context, pane, known);
    strengthen(context, editor.view.scale * pane.ratio);
  });

  const takers = () => versions.chosen.map((id) => versions.detail(id)).filter((version) => version?.takes_edges);

  function update() {
    const able = takers();
    byId("edges").hidden = able.length === 0;
    showTools(able.length > 0 && show.checked);
    const before = select.value;
    select.replaceChildren(...able.map((version) => make("option", {
      value: version.id, textContent: `${title(version)}${version.sigma ? `, σ ${version.sigma}` : ""}`,
    })));
    if (able.some(({ id }) => id === before)) select.value = before;
    if (select.value !== before || !able.length) refresh();
  }

  function showTools(on) {
    byId("edge-tools").hidden = byId("edges-more").hidden = !on;
    if (!on && editor.isPen) editor.choose("brush");
  }

  /** Read the known edges again, if they are shown: they depend on the hole. */
  async function refresh() {
    const ticket = (asked += 1);
    if (!show.checked || !select.value || !editor.photo) {
      known = null;
      return editor.pane.invalidate(layer);
    }
    try {
      const image = await read({});
      if (ticket !== asked) return; // a newer request is under way
      known = recolour(image);
    } catch (error) {
      if (ticket === asked) toast(error.message, "bad");
    }
    editor.pane.invalidate(layer);
  }

  async function read(extra) {
    const version = select.value; // may change while the hole is sent
    await sync.send();
    const query = new URLSearchParams({
      version, max_tile_size: byId("tile").value, ...extra, t: String(Date.now()), // t: never from the cache
    });
    return loadImage(`/api/photos/${editor.photo.id}/edges?${query}`);
  }

  show.addEventListener("change", () => {
    showTools(show.checked);
    refresh();
  });
  select.addEventListener("change", refresh);
  byId("own-edges").addEventListener("click", async () => {
    try {
      editor.loadLines(await read({ inside: "1" }));
      editor.choose("rubber");
      editor.say("The photograph's edges are in the hole. Erase and draw as you like.");
    } catch (error) {
      toast(error.message, "bad");
    }
  });
  byId("clear-lines").addEventListener("click", () => editor.clearLines());
  versions.addEventListener("change", update);
  editor.addEventListener("shown", () => {
    known = null;
    refresh();
  });
  return { refresh };
}

function recolour(image) {
  const canvas = make("canvas", { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = KNOWN_COLOUR;
  context.fillRect(0, 0, canvas.width, canvas.height);
  return canvas;
}

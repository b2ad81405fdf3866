// The pages about models: filters, sorting, the choice of two versions, comparisons, and the dialogs that move aliases.
import { api, follow, toast } from "/static/studio.js";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
document.documentElement.classList.add("js");

// filters -----------------------------------------------------------------------------------------------------------
for (const input of $$("input[data-filter]")) {
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const item of $$(input.dataset.filter)) {
      const text = item.dataset.text.toLowerCase();
      item.hidden = !words.every((word) => text.includes(word));
      count += item.hidden ? 0 : 1;
    }
    const empty = $("#filter-empty");
    if (empty) empty.hidden = count > 0;
  };
  input.addEventListener("input", apply);
  const target = $(input.dataset.filter.split(" ")[0]);
  if (target) new MutationObserver(apply).observe(target, { childList: true });
  apply();
}

// the table of versions ---------------------------------------------------------------------------------------------
const scoreForm = $(".score-form");
scoreForm?.addEventListener("change", () => scoreForm.submit());

const table = $("#version-table");
const chosen = [];
if (table) {
  const body = table.tBodies[0];
  let sorted = { column: 1, kind: "number", down: true };
  const key = (row) => {
    const text = row.cells[sorted.column].dataset.value;
    if (sorted.kind === "text") return text;
    return text === "" ? null : Number(text);
  };
  const sort = () => {
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // without a score: last
      return (a < b ? -1 : a > b ? 1 : 0) * (sorted.down ? -1 : 1);
    });
    body.append(...rows.map(([, row]) => row));
  };
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest(".sort");
    if (!button) return;
    const cell = button.closest("th");
    const down = cell.ariaSort ? cell.ariaSort === "ascending" : button.dataset.sort !== "text";
    for (const other of cell.parentElement.cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    sorted = { column: cell.cellIndex, kind: button.dataset.sort, down };
    sort();
  });

  const compare = $("#compare-chosen");
  const showChosen = () => {
    for (const box of $$("input[data-choose]", body)) box.checked = chosen.includes(box.dataset.choose);
    compare.disabled = chosen.length !== 2;
    compare.classList.toggle("primary", chosen.length === 2);
  };
  body.addEventListener("change", (event) => {
    const number = event.target.dataset.choose;
    if (!number) return;
    if (event.target.checked) chosen.push(number);
    else chosen.splice(chosen.indexOf(number), 1);
    if (chosen.length > 2) chosen.shift(); // the oldest choice gives way
    showChosen();
  });
  compare.addEventListener("click", () => {
    const [a, b] = [...chosen].sort((x, y) => x - y).map((number) => `${compare.dataset.name}/${number}`);
    location.assign(`/models/compare?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`);
  });
  new MutationObserver((changes) => { // the page has refreshed its rows: sorted and chosen as before
    if (changes.some((change) => change.removedNodes.length && change.addedNodes.length)) {
      if (sorted.column !== 1 || !sorted.down) sort();
      showChosen();
    }
  }).observe(body, { childList: true });
  showChosen();
}

// jobs --------------------------------------------------------------------------------------------------------------
/** Replace the content of an element by a part of a page that the studio rendered, and so escaped. */
function showPart(element, html) {
  const part = new DOMParser().parseFromString(html, "text/html");
  element.replaceChildren(...part.body.childNodes);
}

const seconds = (value) => (value < 90 ? `${Math.max(1, Math.round(value))} s` : `${Math.round(value / 60)} min`);

/** Show a job's progress in `area` until it ends. Returns the job. */
async function followIn(area, id) {
  const bar = $("progress", area), note = $(".job-note", area);
  area.hidden = false;
  bar.removeAttribute("value");
  note.textContent = "starting";
  try {
    return await follow(id, (job) => {
      const known = job.total > 1 || job.done > 0;
      if (known) { bar.max = job.total; bar.value = job.done; } else bar.removeAttribute("value");
      const counts = job.total > 1 ? `${job.done} of ${job.total} ` : "";
      const left = job.eta_seconds ? `, about ${seconds(job.eta_seconds)} left` : "";
      const text = job.state === "waiting" ? "waiting for another comparison" : `${counts}${job.note || "starting"}${left}`;
      if (note.textContent !== text) note.textContent = text;
    });
  } finally {
    area.hidden = true;
  }
}

function showError(element, error) {
  element.textContent = error ? error.message : "";
  element.hidden = !error;
}

const compareForm = $("#compare-form");
if (compareForm) {
  const area = $("#compare-progress"), message = $("#compare-error"), button = $("button[type=submit]", compareForm);
  let running = null;
  $(".cancel", area).addEventListener("click", () => running && api("POST", `/api/jobs/${running}/cancel`));
  compareForm.addEventListener("submit", async (event) => {
    event.preventDefault();
    showError(message, null);
    const masks = $$("input[name=masks]:checked", compareForm).map((box) => box.value);
    if (!masks.length || masks.length > 4) return showError(message, new Error("Choose one to four kinds of masks."));
    button.disabled = true;
    try {
      const { a, b } = compareForm.dataset;
      const { photographs, count } = compareForm.elements;
      const body = { a, b, photographs: photographs.value, masks, count: Number(count.value) };
      running = (await api("POST", "/api/models/compare", body)).id;
      const job = await followIn(area, running);
      if (job.state === "finished") showPart($("#compared"), (await api("GET", `/api/models/comparisons/${running}`)).html);
      else toast("Cancelled");
    } catch (error) {
      showError(message, error);
    } finally {
      running = null;
      button.disabled = false;
    }
  });
}

// aliases -----------------------------------------------------------------------------------------------------------
const HINTS = {
  champion: "Another champion is compared with first, on the same photographs and masks.",
  candidate: "The newest version that was registered has this alias; nothing is compared.",
  "": "Letters, digits, _ and -. Nothing is compared.",
};

/** Prepare a dialog: Cancel and Escape close it; submit calls `next`, whose errors are shown. */
function dialogOf(id, next, cancel = () => {}) {
  const dialog = $(id);
  if (!dialog) return null;
  const form = $("form", dialog), submit = $("button[type=submit]", dialog), message = $("[role=alert]", dialog);
  $(".cancel", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", cancel);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    submit.disabled = true;
    showError(message, null);
    try {
      await next();
    } catch (error) {
      showError(message, error);
    } finally {
      submit.disabled = false;
    }
  });
  return dialog;
}

const reload = (text) => { // shown after the reload
  sessionStorage.setItem("models-toast", text);
  location.reload();
};
if (sessionStorage.getItem("models-toast")) {
  toast(sessionStorage.getItem("models-toast"));
  sessionStorage.removeItem("models-toast");
}

let state = null; // of the dialog that is open
let changed = false; // the registry refused: the page is not what it shows

const aliasDialog = dialogOf("#alias-dialog", setAlias, () => {
  if (state?.running) api("POST", `/api/jobs/${state.running}/cancel`).catch(() => {});
  state = null;
  if (changed) location.reload();
});

function chosenAlias() {
  return $("#alias-kind").value || $("#alias-other").value.trim();
}

function showChoice() {
  const kind = $("#alias-kind").value;
  $("#alias-other-field").hidden = kind !== "";
  $("#alias-hint").textContent = HINTS[kind];
  $("#alias-other").required = kind === "";
}

/** Step 1: compare where the registry asks for it, and show what to confirm. Step 2: set the alias. */
async function setAlias() {
  const opened = state; // another one if the dialog is closed and opened again meanwhile
  const { name, version } = opened;
  const path = `/api/models/${encodeURIComponent(name)}/${version}`;
  if (!state.plan) {
    const alias = chosenAlias();
    let plan = await api("POST", `${path}/plan`, { alias });
    if (plan.job) {
      state.running = plan.job.id;
      const job = await followIn($(".job", aliasDialog), plan.job.id);
      if (state !== opened) return;
      state.running = null;
      if (job.state !== "finished") return;
      plan = { ...plan, ...(await api("GET", `/api/models/plans/${plan.job.id}`)) };
    }
    if (state !== opened) return;
    state.plan = { ...plan, alias };
    $(".choose", aliasDialog).hidden = true;
    $("#alias-title").textContent = `Make version ${version} ${alias}`;
    showPart($(".confirmation", aliasDialog), plan.html);
    $(".force", aliasDialog).hidden = !plan.objection;
    const submit = $("button[type=submit]", aliasDialog);
    submit.textContent = `Make version ${version} ${alias}`;
    $(".confirmation", aliasDialog).focus();
    return;
  }
  const { alias, objection, job, seen } = state.plan;
  const force = $(".force input", aliasDialog).checked;
  if (objection && !force) throw new Error("Tick the box to promote it although the registry objects.");
  const body = { alias, reason: $("#alias-reason").value, force, job: job?.id ?? null, seen };
  changed = true;
  const { text } = await api("POST", `${path}/promote`, body);
  reload(text);
}

const rollbackDialog = dialogOf("#rollback-dialog", async () => {
  const { name, alias, seen } = state;
  changed = true;
  const body = { alias, reason: $("#rollback-reason").value, seen };
  reload((await api("POST", `/api/models/${encodeURIComponent(name)}/rollback`, body)).text);
}, () => { if (changed) location.reload(); });

document.addEventListener("click", async (event) => {
  const set = event.target.closest("button[data-set-alias]"), back = event.target.closest("button[data-rollback]");
  if (set && aliasDialog) {
    state = { name: set.dataset.name, version: set.dataset.version, plan: null, running: null };
    $("#alias-kind").value = set.dataset.setAlias;
    $(".choose", aliasDialog).hidden = false;
    $("#alias-title").textContent = `Set an alias on ${state.name} version ${state.version}`;
    $("button[type=submit]", aliasDialog).textContent = "Continue";
    $(".confirmation", aliasDialog).replaceChildren();
    $(".force", aliasDialog).hidden = true;
    $(".force input", aliasDialog).checked = false;
    showError($("[role=alert]", aliasDialog), null);
    showChoice();
    aliasDialog.showModal();
  } else if (back && rollbackDialog) {
    try {
      const { name, rollback: alias } = back.dataset;
      const plan = await api("POST", `/api/models/${encodeURIComponent(name)}/rollback-plan`, { alias });
      state = { name, alias, seen: plan.seen };
      $("#rollback-title").textContent = `Roll ${alias} back to version ${plan.previous}`;
      $("button[type=submit]", rollbackDialog).textContent = `Back to version ${plan.previous}`;
      showPart($(".confirmation", rollbackDialog), plan.html);
      showError($("[role=alert]", rollbackDialog), null);
      rollbackDialog.showModal();
    } catch (error) {
      toast(error.message, "bad");
    }
  }
});
$("#alias-kind")?.addEventListener("change", showChoice);

// Runs: the filter of the list, sorting of trials, and ages that grow while the page is open.

/** `3 min ago`, as the studio's templates write it. */
function age(at) {
  const seconds = Math.max(0, (Date.now() - Date.parse(at)) / 1000);
  if (seconds < 5) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 2 * 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} days ago`;
}

setInterval(() => {
  if (document.hidden) return;
  for (const time of document.querySelectorAll("time[data-age]")) {
    const text = age(time.dateTime);
    if (text !== time.textContent) time.textContent = text;
  }
}, 5000);

const filters = document.getElementById("filters");
if (filters) {
  const list = document.getElementById("runs");
  const input = document.getElementById("filter");
  const buttons = [...filters.querySelectorAll("button[data-state]")];
  const asked = new URLSearchParams(location.search);
  let state = asked.get("state") ?? "";
  input.value = asked.get("text") ?? "";

  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of list.querySelectorAll("li[data-state]")) {
      const text = item.textContent.toLowerCase();
      const fits = (!state || item.dataset.state === state) && words.every((word) => text.includes(word));
      item.hidden = !fits;
      shown += fits;
    }
    document.getElementById("none").hidden = shown > 0;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.state === state));
  };
  const remember = () => {
    const query = new URLSearchParams();
    if (state) query.set("state", state);
    if (input.value) query.set("text", input.value);
    history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
  };
  input.addEventListener("input", () => { apply(); remember(); });
  for (const button of buttons) {
    button.addEventListener("click", () => { state = button.dataset.state; apply(); remember(); });
  }
  new MutationObserver(apply).observe(list, { childList: true });
  filters.hidden = false;
  apply();
}

// Trials: a click on a heading sorts by it, a second one the other way round. Empty cells stay last.
const trials = document.getElementById("run-trials");
if (trials) {
  let column = 0;
  let descending = false;

  const sort = () => {
    const table = trials.querySelector("table[data-sortable]");
    if (!table) return;
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      if (index === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    const value = (row) => row.cells[column].dataset.value ?? "";
    const rows = [...table.tBodies[0].rows];
    const numeric = rows.every((row) => value(row) === "" || !Number.isNaN(Number(value(row))));
    rows.sort((a, b) => {
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
      const order = numeric ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b));
      return descending ? -order : order;
    });
    table.tBodies[0].append(...rows);
  };
  trials.addEventListener("click", (event) => {
    const button = event.target.closest("thead button");
    if (!button) return;
    const index = button.closest("th").cellIndex;
    descending = index === column && !descending;
    column = index;
    sort();
  });
  new MutationObserver((changes) => {
    if (changes.some((change) => change.target === trials)) sort();
  }).observe(trials, { childList: true });
}

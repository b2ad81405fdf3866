// Shared by all pages: requests with the CSRF token, jobs, messages, copy buttons, and the refresh of changed pages.

const csrf = document.querySelector('meta[name="csrf-token"]').content;

/** A request to the studio. Returns the decoded JSON; throws an Error with the studio's sentence. */
export async function api(method, path, body = undefined, headers = {}) {
  const options = { method, headers: { ...headers } };
  if (method !== "GET") options.headers["X-CSRF-Token"] = csrf;
  if (body instanceof Blob) {
    options.body = body;
  } else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The studio does not answer: is `inpaint studio` still running?");
  }
  const text = await response.text();
  let data = {};
  try { data = text ? JSON.parse(text) : {}; } catch { /* not JSON: an error page */ }
  if (!response.ok) throw new Error(data.error ?? `The studio answered ${response.status}.`);
  return data;
}

/** Follow a job until it ends. `onProgress(job)` is called on each change. Returns the finished job; throws its error. */
export async function follow(id, onProgress = () => {}) {
  for (;;) {
    const job = await api("GET", `/api/jobs/${id}`);
    onProgress(job);
    if (job.state === "finished" || job.state === "cancelled") return job;
    if (job.state === "failed") throw new Error(job.error);
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

/** Show a short message; kind is "" or "bad". */
export function toast(text, kind = "") {
  const item = document.createElement("div");
  item.className = `toast ${kind}`;
  item.textContent = text;
  document.getElementById("toasts").append(item);
  setTimeout(() => item.remove(), kind === "bad" ? 10000 : 4000);
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  toast("Copied");
});

// A page with elements [data-live] fetches itself when the registry or the storage changed, and replaces those elements.
if (document.querySelector("[data-live]")) {
  let seen = document.body.dataset.snapshot;
  const check = async () => {
    if (document.hidden) return;
    try {
      const { snapshot } = await api("GET", `/api/snapshot?section=${location.pathname.split("/")[1] || "try"}`);
      if (snapshot === seen) return;
      const response = await fetch(location.href);
      if (!response.ok) return;
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      let renewed = true;
      for (const element of document.querySelectorAll("[data-live]")) {
        const fresh = page.getElementById(element.id);
        if (fresh && fresh.innerHTML !== element.innerHTML) renewed = renew(element, fresh) && renewed;
      }
      if (renewed) seen = snapshot;
    } catch { /* the next check tries again */ }
  };
  setInterval(check, 3000);
  document.addEventListener("visibilitychange", check);
}

/** Replace an element's content; focus, open details and scroll positions stay. False: somebody is typing in it. */
function renew(element, fresh) {
  const active = document.activeElement;
  if (element.querySelector("dialog[open]")) return false;
  if (element.contains(active) && active.matches("input, textarea, select")) return false;
  const all = (selector) => [...element.querySelectorAll(selector)];
  const focusable = "a[href], button, summary, [tabindex]";
  const focused = all(focusable).indexOf(active);
  const open = all("details").map((details) => details.open);
  const left = all(".scroll").map((box) => box.scrollLeft);
  element.replaceChildren(...fresh.childNodes);
  all("details").forEach((details, index) => { details.open = open[index] ?? details.open; });
  all(".scroll").forEach((box, index) => { box.scrollLeft = left[index] ?? 0; });
  if (focused >= 0) all(focusable)[focused]?.focus({ preventScroll: true });
  return true;
}

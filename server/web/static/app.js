// Starts the page: views, colours, the key, and the two polls that everything shown follows from.

import { getJson, hasKey, readiness, useKey } from "./api.js";
import { notice, redraw, show, startDashboard } from "./dashboard.js";
import { byId } from "./dom.js";
import { History } from "./history.js";
import { showModels, startPlayground } from "./playground.js";

const STATS_EVERY = 1000;
const READY_EVERY = 2000;
const THEMES = [["", "◐", "as the system"], ["light", "☀", "light"], ["dark", "☾", "dark"]];
const VIEWS = ["playground", "dashboard"];

const history = new History();
let locked = false; // the server wants a key that this page does not have

// --- views and colours

function showView() {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  for (const each of VIEWS) {
    byId(each).hidden = each !== view;
    if (each === view) byId(`to-${each}`).setAttribute("aria-current", "page");
    else byId(`to-${each}`).removeAttribute("aria-current");
  }
  document.title = view === "dashboard" ? "Dashboard – Slimserve" : "Playground – Slimserve";
  show();
}

function startThemes() {
  let at = 0;
  byId("theme-button").addEventListener("click", () => {
    at = (at + 1) % THEMES.length;
    const [theme, sign, name] = THEMES[at];
    document.documentElement.dataset.theme = theme;
    byId("theme-button").textContent = sign;
    byId("theme-button").title = `Colours: ${name}`;
    byId("theme-button").setAttribute("aria-label", `Colours: ${name}`);
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

// --- the key

function askForKey(message = "") {
  locked = true;
  byId("key-button").hidden = false;
  byId("key-error").textContent = message;
  if (!document.querySelector("dialog[open]")) byId("key-dialog").showModal();
}

function startKeyDialog() {
  byId("key-button").addEventListener("click", () => askForKey());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key").value.trim());
    byId("key").value = "";
    byId("key-dialog").close();
    locked = false;
    readStats();
  });
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
}

// --- what the server says

function showStatus(state, text) {
  byId("status").dataset.state = state;
  byId("status").lastElementChild.textContent = text;
}

async function readReadiness() {
  try {
    const { status, models } = await readiness();
    showModels(models);
    if (status === "ready") return showStatus("good", "ready");
    const loading = models.find((model) => model.state !== "ready");
    const progress = loading?.total ? ` ${Math.round((100 * loading.done) / loading.total)} %` : "";
    showStatus(loading?.state === "failed" ? "bad" : "wait", loading ? `${loading.state}${progress}` : status);
  } catch {
    showStatus("bad", "not reachable");
  }
}

async function readStats() {
  if (locked || document.hidden) return;
  try {
    history.add(await getJson("/stats"), Date.now() / 1000);
    notice("");
    show();
  } catch (error) {
    if (error.status === 401) askForKey(hasKey() ? "The server does not know this key." : "");
    notice(error.status === 403 ? "This key is a tenant's. It opens the playground; the dashboard needs the operator's." : error.message);
  }
}

async function repeat(work, every) {
  for (;;) {
    await work();
    await new Promise((resolve) => { setTimeout(resolve, every); });
  }
}

startThemes();
startKeyDialog();
startPlayground(() => askForKey());
startDashboard(history);
addEventListener("hashchange", showView);
showView();
repeat(readReadiness, READY_EVERY);
repeat(readStats, STATS_EVERY);

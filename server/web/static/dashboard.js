// Tiles, charts and the table of models, from what the history knows.

import { Chart } from "./charts.js";
import { byId, element, fillSelect } from "./dom.js";
import { NONE, bytes, count, seconds, share } from "./format.js";
import { chosen, sum } from "./history.js";

const PERCENTILES = (field) => ["p50", "p95", "p99"].map((name, at) => [name, (point) => point[field]?.[at]]);
const CHARTS = [
  () => new Chart("Throughput", "tokens/s", [["output", (p) => p.tokens], ["computed", (p) => p.computed]], count, 10),
  () => new Chart("Requests", "sequences", [["running", (p) => p.running], ["waiting", (p) => p.waiting]], count, 4),
  () => new Chart("Time to first token", "percentiles", PERCENTILES("ttft"), seconds, 0.01),
  () => new Chart("Time between tokens", "percentiles", PERCENTILES("gap"), seconds, 0.01),
  () => new Chart("Batch size", "mean sequences a step", [["batch", (p) => p.batch]], count, 4),
  () => new Chart("KV cache", "share in use", [["in use", (p) => p.kv]], share, 0.1),
];
const GPU_CHARTS = [
  () => new Chart("GPU", "share of time and of memory", [["busy", gpu((g) => g.utilization)], ["memory", gpu((g) => g.memory_used / g.memory_total)], ["SMs", gpu((g) => g.sm_active)]], share, 1),
  () => new Chart("GPU power", "watts", [["power", (p) => total(p.gpus, "power")]], count, 100),
];

const SHORTEST = 60; // seconds

const charts = [];
const tiles = new Map();
let history;

export function startDashboard(known) {
  history = known;
  addCharts(CHARTS);
  byId("filter").addEventListener("change", show);
  byId("window").addEventListener("change", show);
  new ResizeObserver(() => show()).observe(byId("charts"));
}

export function redraw() {
  if (history.length && !byId("dashboard").hidden) for (const chart of charts) chart.draw();
  show();
}

export function notice(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text;
}

export function show() {
  const stats = history.latest;
  if (stats === undefined) return;
  fillSelect(byId("filter"), ["", ...stats.models.map((model) => model.name)]);
  if (stats.gpus.length && charts.length === CHARTS.length) addCharts(GPU_CHARTS);
  if (byId("dashboard").hidden) return;
  const model = byId("filter").value;
  const until = Date.now() / 1000;
  // A short history is not shown as a long one that is mostly empty.
  const since = Math.max(until - Number(byId("window").value), Math.min(history.begun, until - SHORTEST));
  const points = history.points(model, since);
  for (const chart of charts) chart.show(points, since, until);
  showTiles(stats, history.point(model), model);
  showTable(stats);
}

function addCharts(makers) {
  const made = makers.map((make) => make());
  charts.push(...made);
  byId("charts").append(...made.map((chart) => chart.root));
}

function gpu(value) {
  return (point) => {
    const found = (point.gpus ?? []).map(value).filter((each) => each != null && Number.isFinite(each));
    return found.length ? found.reduce((a, b) => a + b, 0) / found.length : null;
  };
}

function total(items, field) {
  const known = (items ?? []).map((item) => item[field]).filter((value) => value != null);
  return known.length ? known.reduce((a, b) => a + b, 0) : null;
}

// --- tiles

function showTiles(stats, point, model) {
  const models = chosen(stats, model);
  const hits = sum(models, "prefix_hit_tokens") / sum(models, "prefix_query_tokens");
  tile("Output", count(point.tokens), "tokens/s", `${count(point.computed)} computed`);
  tile("Running", count(point.running), "", `${count(point.waiting)} waiting`);
  tile("First token", seconds(point.ttft[0]), "p50", `p95 ${seconds(point.ttft[1])}`);
  tile("Token gap", seconds(point.gap[0]), "p50", `p95 ${seconds(point.gap[1])}`);
  tile("Batch", count(point.batch), "mean", `budget ${count(sum(models, "token_budget"))} tokens`);
  tile("KV cache", share(point.kv), "in use", Number.isFinite(hits) ? `prefix hits ${share(hits)}` : "no prefix looked up");
  if (stats.gpus.length) tile("GPU", share(gpu((g) => g.utilization)(point)), "busy", `${bytes(total(stats.gpus, "memory_used"))}, ${count(total(stats.gpus, "power"))} W`);
  else tile("Memory", bytes(total(Object.values(stats.worker_memory).map((used) => ({ used })), "used")), "", "of workers, no GPU");
}

function tile(name, value, unit, more) {
  if (!tiles.has(name)) {
    const made = { value: element("b"), unit: element("small"), more: element("span") };
    tiles.set(name, made);
    byId("tiles").append(element("div", { class: "tile" }, element("h2", { textContent: name }), element("p", {}, made.value, made.unit), made.more));
  }
  const parts = tiles.get(name);
  parts.value.textContent = value;
  parts.unit.textContent = value === NONE ? "" : unit;
  parts.more.textContent = more;
}

// --- table

function showTable(stats) {
  const rows = stats.models.map((model) => {
    const point = history.point(model.name);
    const answered = (model.endings.stop ?? 0) + (model.endings.length ?? 0);
    const refused = Object.values(model.refusals).reduce((a, b) => a + b, 0);
    const cells = [
      stateCell(model), `${model.dtype} ${model.device}`.trim() || NONE, count(model.running), count(model.waiting),
      count(point.tokens), share(model.kv_usage), bytes(model.weight_bytes), count(model.max_model_len), count(answered), count(refused),
    ];
    return element("tr", {}, element("th", { scope: "row", textContent: model.name }), ...cells.map((cell) => element("td", {}, cell)));
  });
  byId("models").tBodies[0].replaceChildren(...rows);
}

function stateCell(model) {
  const progress = model.total ? ` ${share(model.done / model.total)}` : "";
  const text = model.state === "loading" && model.phase ? `${model.phase}${progress}` : model.state;
  return element("span", { class: "state", "data-state": model.state, title: model.reason, textContent: text });
}

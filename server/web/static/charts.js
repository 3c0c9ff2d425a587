// Charts over time, drawn by uPlot. One cursor goes through all of them.

import { colour, element } from "./dom.js";
import { clock } from "./format.js";

const HEIGHT = 170;
const WIDTHS = [2, 1.5, 1.5];
const pens = ["--accent", "--second", "--third"];

function times(plot, ticks) {
  const close = ticks.length > 1 && ticks[1] - ticks[0] < 60;
  return ticks.map((tick) => clock(tick, close));
}

export class Chart {
  #lines;
  #format;
  #plot = null;
  #body = element("div", { class: "plot" });
  #values;
  #data = [[]];
  #top;

  // lines: [name, (point) => value or null]. top: the least that the axis reaches to.
  constructor(title, unit, lines, format, top) {
    this.#lines = lines;
    this.#format = format;
    this.#top = top;
    this.#values = lines.map(() => element("b", { textContent: "–" }));
    const legend = lines.map(([name], at) => element("span", { class: `pen pen-${at}` }, element("i"), `${name} `, this.#values[at]));
    this.root = element("figure", { class: "chart", "aria-label": `${title}, ${unit}` },
      element("figcaption", {}, element("h3", {}, title, element("small", { textContent: unit })), element("div", { class: "legend" }, ...legend)),
      this.#body);
  }

  show(points, since, until) {
    this.#data = [points.map((point) => point.now), ...this.#lines.map(([, value]) => points.map((point) => value(point) ?? null))];
    if (this.#body.clientWidth === 0) return; // not on the screen
    if (this.#plot === null) this.draw();
    else if (this.#plot.width !== this.#body.clientWidth) this.#plot.setSize({ width: this.#body.clientWidth, height: HEIGHT });
    this.#plot.batch(() => {
      this.#plot.setData(this.#data, false);
      this.#plot.setScale("x", { min: since, max: until });
    });
    if (this.#plot.cursor.idx == null) this.#tell(this.#data[0].length - 1);
  }

  // Again, where colours have changed.
  draw() {
    this.#plot?.destroy();
    const grid = { stroke: colour("--line"), width: 1 };
    const axis = { stroke: colour("--muted"), font: "11px system-ui", ticks: { show: false }, grid };
    this.#plot = new uPlot({
      width: this.#body.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "time" }, drag: { x: false, y: false }, points: { size: 6 } },
      scales: { x: { time: true }, y: { range: (plot, low, high) => [0, Math.max((high ?? 0) * 1.1, this.#top)] } },
      axes: [{ ...axis, size: 26, space: 80, values: times }, { ...axis, size: 58, space: 34, values: (plot, ticks) => ticks.map((tick) => this.#format(tick)) }],
      series: [{}, ...this.#lines.map((line, at) => this.#pen(at))],
      hooks: { setCursor: [(plot) => this.#tell(plot.cursor.idx ?? this.#data[0].length - 1)] },
    }, this.#data, this.#body);
  }

  #pen(at) {
    const stroke = colour(pens[at]);
    const faint = stroke.replace(/^rgb\((.*)\)$/, "rgba($1, 0.12)");
    return { stroke, width: WIDTHS[at], points: { show: false }, fill: at === 0 ? faint : undefined };
  }

  #tell(index) {
    this.#values.forEach((value, at) => { value.textContent = this.#format(this.#data[at + 1]?.[index]); });
  }
}

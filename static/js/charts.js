// Line and stacked-area charts over the last five minutes, drawn by uPlot in the page's own colours.

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { el } from "./dom.js";
import { clock } from "./format.js";
import { resolveColour } from "./palette.js";

const SPAN_S = 300;

/**
 * One chart in `parent`. `format(value)` words axis and tooltip values, `least` is the lowest top of the axis, `steps` are
 * the distances its marks may have (uPlot's own by default), `stacked` sums the series upwards.
 */
export class Chart {
  constructor(parent, { format, least, steps, stacked = false, legend = null }) {
    Object.assign(this, { parent, format, least, steps, stacked, legend, plot: null, shape: "" });
    this.tooltip = el("div", { class: "tooltip", hidden: true });
    new ResizeObserver(() => this.resize()).observe(parent);
  }

  /** `times` in unix seconds; `series` as {label, colour, values, dash}. */
  draw(times, series, nowS) {
    this.series = series;
    this.now = nowS;
    const shape = series.map((s) => s.label + s.colour).join();
    const data = [times, ...(this.stacked ? stack(series) : series.map((s) => s.values))];
    if (!this.plot || shape !== this.shape) this.build(data, shape);
    else this.plot.setData(data);
  }

  /** Colours are baked into a canvas: draw anew when the theme changes. */
  recolour() {
    if (this.plot) this.build(this.plot.data, this.shape);
  }

  build(data, shape) {
    this.plot?.destroy();
    this.shape = shape;
    this.drawLegend();
    this.plot = new uPlot(this.options(), data, this.parent);
    this.plot.over.append(this.tooltip);
  }

  options() {
    const axis = {
      stroke: resolveColour("var(--text-soft)"),
      font: "11px system-ui, sans-serif",
      ticks: { show: false },
    };
    const grid = { stroke: resolveColour("var(--line)"), width: 1 };
    return {
      ...this.size(),
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: this.stacked ? { show: false } : { size: 6 }, drag: { setScale: false, x: false } },
      scales: {
        x: { range: () => [this.now - SPAN_S, this.now] },
        y: { range: (_, low, high) => [0, Math.max((high ?? 0) * 1.08, this.least)] },
      },
      axes: [
        {
          ...axis,
          size: 24,
          grid: { show: false },
          space: 60,
          splits: () => [240, 180, 120, 60, 0].map((s) => this.now - s),
          values: (_, splits) =>
            splits.map((at) => (this.now - at < 1 ? "now" : `−${Math.round((this.now - at) / 60)} min`)),
        },
        {
          ...axis,
          size: 46,
          grid,
          space: 34,
          ...(this.steps && { incrs: this.steps }),
          values: (_, splits) => splits.map((v) => this.format(v)),
        },
      ],
      series: [{}, ...this.series.map((s) => this.line(s))],
      hooks: { setCursor: [(plot) => this.point(plot)] },
    };
  }

  line({ label, colour, dash }) {
    const stroke = resolveColour(colour);
    return {
      label,
      stroke,
      dash,
      width: this.stacked ? 1 : 1.8,
      fill: this.stacked ? stroke : undefined,
      points: { show: false },
      spanGaps: false,
    };
  }

  point(plot) {
    const { idx, left } = plot.cursor;
    this.tooltip.hidden = idx === null || idx === undefined || left < 0;
    if (this.tooltip.hidden) return;
    if (plot.data[0][idx] === undefined) return;
    const rows = this.series
      .map((s) => [s, s.values[idx]])
      .filter(([, value]) => value !== null && (!this.stacked || value > 0));
    this.tooltip.replaceChildren(
      el("b", { text: this.when(plot.data[0][idx]) }),
      ...rows.map(([s, value]) => {
        const swatch = el("i", { class: "swatch" });
        swatch.style.background = s.colour;
        return el("span", {}, swatch, el("span", { text: s.label }), el("strong", { text: this.format(value) }));
      }),
    );
    this.tooltip.classList.toggle("left", left > plot.over.clientWidth / 2);
    this.tooltip.style.left = `${left}px`;
  }

  when(seconds) {
    return clock(seconds * 1000);
  }

  drawLegend() {
    this.legend?.replaceChildren(
      ...this.series.map((s) => {
        const swatch = el("i", { class: s.dash ? "swatch dashed" : "swatch" });
        swatch.style.setProperty("--colour", s.colour);
        return el("li", {}, swatch, ` ${s.label}`);
      }),
    );
  }

  size() {
    return { width: Math.max(120, this.parent.clientWidth), height: Math.max(80, this.parent.clientHeight) };
  }

  resize() {
    this.plot?.setSize(this.size());
  }

  /** What the canvas shows, for who cannot see it. */
  describe(text) {
    if (this.described !== text) this.parent.setAttribute("aria-label", text);
    this.described = text;
  }
}

/** Running sums from the last series up, so that the first one's area is drawn first and the others cover its foot. */
function stack(series) {
  const sums = new Array(series[0]?.values.length ?? 0).fill(0);
  const stacked = [];
  for (const { values } of [...series].reverse()) {
    values.forEach((value, i) => (sums[i] += value ?? 0));
    stacked.unshift([...sums]);
  }
  return stacked;
}

// A line over any period, beside the period it is compared with, with changes of policy and alerts marked.

import { Chart } from "./charts.js";
import { resolveColour } from "./palette.js";

export class PeriodChart extends Chart {
  /** `from`, `to` in unix seconds; `marks` as [unix seconds, label], `spans` as [from, to, label, severity]. */
  drawPeriod(times, series, { from, to, marks, spans = [] }) {
    Object.assign(this, { from, to, marks, spans });
    this.draw(times, series, to);
  }

  options() {
    const options = super.options();
    const { stroke, font, ticks } = options.axes[0];
    const values = (_, splits) => splits.map((at) => this.axisTime(at));
    options.axes[0] = { stroke, font, ticks, size: 24, space: 76, grid: { show: false }, values };
    options.padding = [8, 28, 0, 0]; // room for half of the last time
    options.scales.x = { time: true, range: () => [this.from, this.to] };
    options.hooks.drawClear = [(plot) => this.shade(plot)];
    options.hooks.draw = [(plot) => this.mark(plot)];
    return options;
  }

  when(seconds) {
    return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
  }

  axisTime(seconds) {
    const at = new Date(seconds * 1000);
    const time = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
    if (this.to - this.from <= 1200) return at.toLocaleTimeString([], { ...time, second: "2-digit" });
    if (this.to - this.from <= 100_000) return at.toLocaleTimeString([], time);
    const midnight = at.getHours() === 0 && at.getMinutes() === 0;
    return at.toLocaleString("en", { month: "short", day: "numeric", ...(midnight ? {} : time) });
  }

  /** Behind the line: when alerts fired, with their rules at the foot, one above the other. */
  shade(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${10.5 * devicePixelRatio}px system-ui, sans-serif`;
    const labels = [...new Set(this.spans.map(([, , label]) => label))];
    const named = new Set();
    for (const [from, to, label, severity] of this.spans) {
      const [left, right] = [Math.max(from, this.from), Math.min(to, this.to)].map((at) => plot.valToPos(at, "x", true));
      ctx.fillStyle = resolveColour(severity === "critical" ? "var(--bad)" : "var(--warn)");
      ctx.globalAlpha = 0.07;
      ctx.fillRect(left, bbox.top, Math.max(right - left, 2 * devicePixelRatio), bbox.height);
      ctx.globalAlpha = 1;
      if (named.has(label)) continue;
      named.add(label);
      const place = labels.indexOf(label);
      const foot = bbox.top + bbox.height - (4 + 12 * (place % 3)) * devicePixelRatio;
      ctx.fillText(label, Math.min(left + 3 * devicePixelRatio, bbox.left + bbox.width - ctx.measureText(label).width), foot);
    }
    ctx.restore();
  }

  mark(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = resolveColour("var(--warn)");
    ctx.fillStyle = ctx.strokeStyle;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
    let free = bbox.left; // where the last label ends: marks that stand closer share the first one's
    for (const [at, label] of this.marks) {
      const x = Math.round(plot.valToPos(at, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      if (x < free) continue;
      ctx.fillText(label, x + 3 * devicePixelRatio, bbox.top + 10 * devicePixelRatio);
      free = x + ctx.measureText(label).width + 6 * devicePixelRatio;
    }
    ctx.restore();
  }
}

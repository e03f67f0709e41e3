// A line over any period, beside the period it is compared with, with the changes of policy marked.

import { Chart } from "./charts.js";
import { resolveColour } from "./palette.js";

export class PeriodChart extends Chart {
  /** `from`, `to` in unix seconds; `marks` as [unix seconds, label]. */
  drawPeriod(times, series, { from, to, marks }) {
    Object.assign(this, { from, to, marks });
    this.draw(times, series, to);
  }

  options() {
    const options = super.options();
    const { stroke, font, ticks } = options.axes[0];
    const values = (_, splits) => splits.map((at) => this.axisTime(at));
    options.axes[0] = { stroke, font, ticks, size: 24, space: 76, grid: { show: false }, values };
    options.scales.x = { time: true, range: () => [this.from, this.to] };
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
    for (const [at, label] of this.marks) {
      const x = Math.round(plot.valToPos(at, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(label, x + 3 * devicePixelRatio, bbox.top + 10 * devicePixelRatio);
    }
    ctx.restore();
  }
}

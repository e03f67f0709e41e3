// The page of history: fetches the series of the chosen period and draws a chart for each metric.

import { byId, setText } from "./dom.js";
import { brief, bytes, clock, rate } from "./format.js";
import { PeriodChart } from "./period_chart.js";
import { startShell } from "./shell.js";

const PERIOD_MS = 15_000;
const plots = [...document.querySelectorAll("#charts .plot")];
const FORMATS = { s: (v) => (v === 0 ? "0" : brief(v)), bytes, requests: rate, ms: (v) => `${rate(v)} ms`, "%": (v) => `${rate(v)} %` };
const formatOf = (unit) => FORMATS[unit] ?? rate;
const charts = new Map(
  plots.map((plot) => [plot.dataset.metric, new PeriodChart(plot, { format: formatOf(plot.dataset.unit), least: leastOf(plot.dataset.unit) })]),
);

function leastOf(unit) {
  return { s: 0.01, bytes: 2 ** 20, ms: 1, "%": 100, "tokens/s": 10 }[unit] ?? 1;
}

let asked = 0;
let asking = false;
let drawn = null;

startShell({
  onState: () => {
    const moving = !new URLSearchParams(location.search).get("until");
    if (!asking && plots.length && !document.hidden && moving && Date.now() - asked > PERIOD_MS) ask();
  },
  onTheme: () => [...charts.values()].forEach((chart) => chart.recolour()),
});
if (plots.length) ask();

async function ask() {
  asking = true;
  asked = Date.now();
  try {
    const answer = await fetch(url(), { headers: { Accept: "application/json" } });
    const found = await answer.json();
    if (answer.ok) draw(found);
    else setText(byId("history-state"), found.error.message);
  } catch {
    setText(byId("history-state"), drawn ? "The server does not answer; this is what was read before." : "The server does not answer.");
  } finally {
    asking = false;
  }
}

/** The page's own choice, with times of the reader's zone made absolute. */
function url() {
  const form = new FormData(byId("period-form"));
  const query = new URLSearchParams({ model: form.get("model"), compare: form.get("compare") ?? "" });
  for (const name of ["since", "until"]) {
    const value = byId("period-form").elements[name].defaultValue;
    if (value) query.set(name, new Date(value).toISOString());
  }
  const span = [...byId("period-form").elements.span.options].find((option) => option.defaultSelected)?.value;
  if (span) query.set("span", span);
  const replica = [...(byId("period-form").elements.replica?.options ?? [])].find((option) => option.defaultSelected);
  if (replica?.value) query.set("replica", replica.value);
  for (const plot of plots) query.append("metric", plot.dataset.metric);
  return `/api/v1/operator/history?${query}`;
}

function draw(found) {
  drawn = found;
  const { start_s: from, end_s: to, resolution_s: step, times_s: times, changes, alerts } = found;
  const marks = changes.map((change) => [change.when_s, `r${change.revision}`]);
  const spans = alerts.map((alert) => [alert.fired_s, alert.resolved_s ?? to, alert.rule, alert.severity]);
  let some = false;
  for (const [metric, chart] of charts) {
    const { title, unit, values, compared } = found.metrics[metric];
    const series = [{ label: title, colour: "var(--chart-1)", values }];
    if (compared) series.unshift({ label: "compared", colour: "var(--chart-2)", values: compared, dash: [5, 4] });
    chart.drawPeriod(times, series, { from, to, marks, spans });
    some ||= values.some((v) => v !== null);
    const mean = average(values);
    const then = compared && average(compared);
    const format = formatOf(unit);
    const text = mean === null ? "nothing recorded" : `mean ${format(mean)}${then ? `, before ${format(then)} (${change(mean, then)})` : ""}`;
    setText(document.querySelector(`[data-sum="${metric}"]`), text);
    chart.describe(`${title} in ${unit}: ${text}`);
  }
  const grid = { 1: "seconds", 60: "minutes", 3600: "hours" }[step];
  const other = [...byId("period-form").elements.compare.options].find((option) => option.defaultSelected && option.value);
  const dashed = other ? `; dashed: ${other.text}` : "";
  setText(byId("history-state"), some ? `By ${grid}, as of ${clock(Date.now())}${dashed}` : "Nothing was recorded in this period.");
}

function average(values) {
  const known = values.filter((v) => v !== null);
  return known.length ? known.reduce((sum, v) => sum + v, 0) / known.length : null;
}

const change = (now, before) => `${now >= before ? "+" : "−"}${Math.abs(Math.round((100 * (now - before)) / before))} %`;

// Columns of the history rows that dashboard/document.py makes, and the series that charts draw from them.

import { PRIORITIES, priorityColour, tenantColour } from "./palette.js";

const COLUMNS = {
  time: 0,
  priorities: 1,
  tenants: 2,
  running: 3,
  tokens: 4,
  arrivals: 5,
  completions: 6,
  queue: 7,
  ttft50: 8,
  ttft99: 9,
};
const MAX_TENANTS = 8;

export const column = (rows, name) => rows.map((row) => row[COLUMNS[name]]);

/** Series of the queue's chart: {label, colour, values} in order of importance. */
export function split(rows, by) {
  return by === "tenant" ? byTenant(rows) : byPriority(rows);
}

function byPriority(rows) {
  return PRIORITIES.map((label, level) => ({
    label,
    colour: priorityColour(level),
    values: rows.map((row) => row[COLUMNS.priorities][level]),
  }));
}

function byTenant(rows) {
  const sums = new Map();
  for (const row of rows) {
    for (const [name, n] of Object.entries(row[COLUMNS.tenants])) sums.set(name, (sums.get(name) ?? 0) + n);
  }
  const names = [...sums].sort((a, b) => b[1] - a[1]).map(([name]) => name);
  const shown = names.slice(0, MAX_TENANTS).sort();
  const series = shown.map((label) => ({
    label,
    colour: tenantColour(label),
    values: rows.map((row) => row[COLUMNS.tenants][label] ?? 0),
  }));
  if (names.length > shown.length) {
    const rest = names.slice(MAX_TENANTS);
    const values = rows.map((row) => rest.reduce((sum, name) => sum + (row[COLUMNS.tenants][name] ?? 0), 0));
    series.push({ label: "others", colour: "var(--tenant-other)", values });
  }
  return series;
}

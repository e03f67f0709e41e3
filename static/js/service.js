// How the last minute's requests were served, by tenant and priority, against their targets.

import { byId, el, keyed, setText } from "./dom.js";
import { brief, count, NONE } from "./format.js";
import { PRIORITIES } from "./palette.js";

const COLUMNS = 11;
const percent = (share) => (share === undefined ? NONE : `${(Math.floor(share * 1000) / 10).toFixed(1)} %`);

/** `rows` by `tenant/priority`, as dashboard/selectors/service.py makes them; the highest priority first. */
export function drawService(rows) {
  const listed = Object.values(rows).sort((a, b) => a.priority - b.priority || a.tenant.localeCompare(b.tenant));
  byId("service").hidden = listed.length === 0;
  byId("service-empty").hidden = listed.length > 0;
  keyed(byId("service").tBodies[0], listed, (row) => `${row.tenant}/${row.priority}`, create, update);
}

function create(row) {
  const cells = Array.from({ length: COLUMNS - 1 }, (_, i) => el("td", { class: i > 0 ? "num" : "" }));
  for (const place of [4, 7, 9]) cells[place].classList.add("target");
  return el("tr", {}, el("th", { scope: "row", text: row.tenant }), ...cells);
}

function update(node, { priority, num, ttft, tpot, met, objective }) {
  const cells = node.cells;
  setText(cells[1], PRIORITIES[priority] ?? String(priority));
  setText(cells[2], count(num));
  percentiles(cells, 3, ttft);
  percentiles(cells, 6, tpot);
  setText(cells[9], percent(met));
  flag(cells[9], met !== undefined && objective !== undefined && met < objective, "below the objective");
  setText(cells[10], percent(objective));
}

function percentiles(cells, place, { p50_s, p99_s, target_s }) {
  setText(cells[place], brief(p50_s));
  setText(cells[place + 1], brief(p99_s));
  flag(cells[place + 1], p99_s > target_s, "over the target");
  setText(cells[place + 2], brief(target_s));
}

function flag(cell, isOver, title) {
  cell.classList.toggle("over", isOver);
  if (isOver) cell.title = title;
  else cell.removeAttribute("title");
}

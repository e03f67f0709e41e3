// Figures, queue, backpressure, policy: the panels of one model.

import { byId, el, keyed, setAttribute, setText, setVariable } from "./dom.js";
import { brief, count, percent, plural, rate } from "./format.js";
import { PRIORITIES, priorityColour, tenantColour, tenantHatched } from "./palette.js";

/** Two of these share a narrow tile. */
const flow = (perS) => (perS < 10 ? rate(perS) : count(Math.round(perS)));
const figure = (name, text) => setText(document.querySelector(`[data-figure="${name}"]`), text);

export function drawFigures(model, replicas) {
  const slots = replicas.reduce((sum, [, r]) => sum + r.max_batch_size, 0);
  figure("depth", count(model.depth));
  figure("depth-sub", `${count(model.waiting_tokens)} tokens`);
  document.querySelector('[data-figure="depth-sub"]').title = `at most ${count(model.queue_limit)} requests may wait`;
  figure("oldest", brief(model.oldest_wait_s));
  figure(
    "oldest-sub",
    model.depth === 0
      ? "nothing waits"
      : model.estimated_wait_s === undefined
        ? "no estimate yet"
        : `joining now ≈ ${brief(model.estimated_wait_s)}`,
  );
  figure("running", count(model.running));
  figure("running-sub", slots ? `of ${plural(slots, "slot")}` : "no worker");
  figure("tokens", rate(model.tokens_per_s));
  figure("tokens-sub", `${count(model.batch_tokens)} in context`);
  figure("flow", `${flow(model.arrivals_per_s)} · ${flow(model.completions_per_s)}`);
  figure("flow-sub", "over the last 5 s");
  drawWait("queue", model.waits.queue);
  drawWait("ttft", model.waits.ttft);
  drawWait("tpot", model.waits.tpot);
  figure("kv", percent(model.kv_usage));
  const meter = byId("kv-meter");
  meter.value = (model.kv_usage ?? 0) * 100;
}

function drawWait(name, wait) {
  figure(`${name}-p50`, brief(wait?.p50_s));
  figure(`${name}-sub`, wait ? `p99 ${brief(wait.p99_s)} of ${count(wait.num)}` : "no request");
}

/** The queue now, split by priority or by tenant, as a table with bars. */
export function drawSplit(model, by) {
  const rows = by === "tenant" ? tenantRows(model) : priorityRows(model);
  const most = Math.max(1, ...rows.map((row) => row.num));
  byId("split-empty").hidden = rows.length > 0;
  keyed(
    byId("split").tBodies[0],
    rows,
    (row) => row.label,
    createRow,
    (node, row) => {
      const [, num, bar] = node.cells;
      setText(num, count(row.num));
      const fill = bar.firstElementChild;
      setVariable(fill, "--colour", row.colour);
      setVariable(node.cells[0].firstElementChild, "--colour", row.colour);
      node.cells[0].firstElementChild.classList.toggle("hatched", Boolean(row.hatched));
      fill.classList.toggle("hatched", Boolean(row.hatched));
      setVariable(fill, "--share", `${(100 * row.num) / most}%`);
    },
  );
}

function createRow(row) {
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("i", { class: "swatch" }), ` ${row.label}`),
    el("td", { class: "num" }),
    el("td", { class: "bar-cell" }, el("i", { class: "fill" })),
  );
}

const priorityRows = (model) =>
  PRIORITIES.map((label, level) => ({ label, num: model.by_priority[level] ?? 0, colour: priorityColour(level) }));

function tenantRows(model) {
  const rows = Object.entries(model.by_tenant).map(([label, num]) => ({
    label,
    num,
    colour: tenantColour(label),
    hatched: tenantHatched(label),
  }));
  rows.sort((a, b) => b.num - a.num || a.label.localeCompare(b.label, "en", { numeric: true }));
  if (model.other_tenants) rows.push({ label: "others", num: model.other_tenants, colour: "var(--tenant-other)" });
  return rows;
}

const LEVEL_SIGNS = ["✓", "▲", "▲", "▲▲", "■"];

export function drawBackpressure({ level, name, reason, refused }) {
  setAttribute(byId("level"), "data-level", level);
  setText(byId("level"), `${LEVEL_SIGNS[level]} ${level} of 4, ${name}`);
  const gauge = byId("gauge");
  while (gauge.children.length < 4) gauge.append(el("i"));
  setAttribute(gauge, "data-level", level);
  setText(
    byId("level-reason"),
    level === 0
      ? "All priorities are admitted."
      : `${reason[0].toUpperCase()}${reason.slice(1)}. Refused with 503: ${refused.join(", ")}.`,
  );
}

export function drawPolicy(policy, replicas) {
  setText(byId("policy-name"), policy.name);
  setText(
    byId("policy-params"),
    Object.entries(policy.params)
      .map(([key, value]) => `${key} ${value}`)
      .join(", "),
  );
  setText(byId("revision"), `revision ${policy.revision}`);
  setText(byId("policy-description"), policy.description);
  setText(byId("policy-guarantee"), policy.guarantee && `Guarantee: ${policy.guarantee}`);
  const live = replicas.filter(([, r]) => r.state !== "lost");
  const behind = live.filter(([, r]) => r.policy_revision < policy.revision);
  return { live: live.length, behind: behind.map(([name]) => name) };
}

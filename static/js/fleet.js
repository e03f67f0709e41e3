// The page of the fleet: a panel for each worker, and the dialogs that steer one.

import { ControlDialog } from "./dialogs.js";
import { byId, el, keyed, setAttribute, setText } from "./dom.js";
import { ago, brief, count, plural } from "./format.js";
import { announce, startShell } from "./shell.js";
import { TuneDialog } from "./tune.js";
import { COMMANDS, SIGNS, createFact, facts, updateFact } from "./workers.js";

const TUNES = { set_batch_size: "Batch size…", set_mode: "Mode…", sizing: "Sizing…" };
const list = byId("fleet");
const steered = list.dataset.control !== undefined;
const done = (answer) => announce(answer.message);
const controlling = steered && new ControlDialog(done);
const tuning = steered && new TuneDialog(done);
let replicas = {};

startShell({
  onState: ({ state }) => {
    replicas = state.replicas;
    const rows = Object.entries(replicas).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
    byId("fleet-loading").hidden = true;
    byId("fleet-empty").hidden = rows.length > 0;
    const ready = rows.filter(([, r]) => r.state === "ready").length;
    setText(byId("fleet-sum"), `${count(ready)} of ${plural(rows.length, "worker")} ready, all models`);
    keyed(
      list,
      rows,
      ([name]) => name,
      create,
      (node, item) => update(node, item, state.time_s),
    );
  },
});

function create([name, r]) {
  const buttons = el("span", { class: "worker-buttons" });
  buttons.addEventListener("click", (event) => steer(name, event.target.closest("button")?.dataset.key));
  return el(
    "li",
    { class: "panel worker", id: `worker-${name}` },
    el(
      "div",
      { class: "worker-head" },
      el("h2", { text: name }),
      el("span", { class: "state" }),
      el("span", { class: "soft where" }),
      el("a", { class: "soft", href: historyOf(name, r), text: "History", "aria-label": `History of ${name}` }),
      buttons,
    ),
    el("p", { class: "detail soft" }),
    el("dl", { class: "facts" }),
    el("div", { class: "batching" }, part("Batch size"), part("Triggers")),
  );
}

/** The page of history with what this worker and its device recorded. */
function historyOf(name, r) {
  const query = new URLSearchParams({ model: r.model, replica: name });
  for (const metric of ["output_tokens", "batch_size", "step_ms", "kv", "utilization", "memory"]) query.append("metric", metric);
  return `/history/?${query}`;
}

const part = (title) => el("section", {}, el("h3", { text: title }), el("p", { class: "now-line" }), el("ol"));

function steer(name, command) {
  if (!command) return;
  if (command in TUNES) tuning.show(name, command, replicas[name]);
  else controlling.show(name, command);
}

function update(node, [name, r], now) {
  const lost = r.state === "lost";
  const state = node.querySelector(".state");
  setAttribute(state, "data-state", r.state);
  setText(state, `${SIGNS[r.state] ?? "?"} ${r.state}`);
  setText(node.querySelector(".where"), `${r.model} on ${r.host}, pid ${r.pid}`);
  const detail = node.querySelector(".detail");
  setText(detail, lost ? `Silent for ${brief(Math.max(0, Math.round(now - r.heard_s)))}.` : r.detail);
  detail.hidden = !detail.textContent;
  const running = ["running", `${count(r.batch_size)} of ${count(r.max_batch_size)} slots`, r.batch_size / Math.max(1, r.max_batch_size)];
  const rows = lost ? [] : [running, ...facts(r, now), ...restarts(r)];
  keyed(node.querySelector(".facts"), rows, ([label]) => label, createFact, updateFact);
  drawButtons(node.querySelector(".worker-buttons"), name, r);
  drawBatching(node.querySelector(".batching"), r, now, lost);
}

const restarts = (r) =>
  Object.keys(r.restarts).length
    ? [["restarts", Object.entries(r.restarts).map(([why, n]) => `${count(n)} ${why}`).join(", ")]]
    : [];

function drawButtons(parent, name, r) {
  const known = COMMANDS[r.state] ?? [];
  const commands = steered ? [...known, ...(known.length ? Object.keys(TUNES) : [])] : [];
  keyed(
    parent,
    commands,
    (c) => c,
    (c) => {
      const text = TUNES[c] ?? `${c[0].toUpperCase()}${c.slice(1)}`;
      return el("button", { type: "button", class: "button small", text, "aria-label": `${text} ${name}` });
    },
    () => {},
  );
}

function drawBatching(parent, r, now, lost) {
  parent.hidden = lost;
  if (lost) return;
  const [size, triggers] = parent.children;
  const params = Object.entries(r.sizing_params).map(([key, value]) => `${key} ${value}`);
  setText(size.children[1], `${count(r.max_batch_size)}, by ${r.sizing}${params.length ? ` (${params.join(", ")})` : ""}`);
  keyed(
    size.children[2],
    [...r.size_changes].reverse(),
    ([when, n]) => `${when} ${n}`,
    ([when, n, reason]) => el("li", {}, el("b", { text: count(n) }), ` ${reason} `, el("time", { class: "soft", datetime: new Date(when * 1000).toISOString() })),
    (node, [when]) => setText(node.lastElementChild, ago(when, now)),
  );
  const latest = r.trigger ? `latest: ${r.trigger}${r.trigger_reason ? `, ${r.trigger_reason}` : ""}` : "";
  setText(triggers.children[1], `${r.mode}${latest ? `; ${latest}` : r.mode === "continuous" ? ": requests join at any step" : ""}`);
  keyed(
    triggers.children[2],
    Object.entries(r.triggers),
    ([trigger]) => trigger,
    ([trigger]) => el("li", {}, el("b"), ` ${trigger}`),
    (node, [, n]) => setText(node.firstElementChild, plural(n, "batch").replace("batchs", "batches")),
  );
}

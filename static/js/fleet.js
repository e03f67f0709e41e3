// The page of the fleet: what is wanted and what runs, machines, a panel for each worker, and the dialogs that steer them.

import { ControlDialog } from "./dialogs.js";
import { byId, el, keyed, setAttribute, setText } from "./dom.js";
import { ago, brief, bytes, count, plural } from "./format.js";
import { AddDialog, ChangeDialog, places } from "./replica_dialogs.js";
import { announce, startShell } from "./shell.js";
import { TuneDialog } from "./tune.js";
import { COMMANDS, SIGNS, createFact, facts, updateFact } from "./workers.js";

const TUNES = { set_batch_size: "Batch size…", set_mode: "Mode…", sizing: "Sizing…" };
const CHANGES = { restart: "Restart…", remove: "Remove…", start: "Start…" };
const MORE_SIGNS = { ...SIGNS, stopping: "◒", waiting: "✕", missing: "◌" };
const list = byId("fleet");
const steered = list.dataset.control !== undefined;
const done = (answer) => announce(answer.message);
const controlling = steered && new ControlDialog(done);
const tuning = steered && new TuneDialog(done);
const adding = steered && new AddDialog(done);
const changing = steered && new ChangeDialog(done);
let replicas = {};
let plan = { wanted: {}, wishes: {}, machines: {} };
let models = {};

if (steered) byId("add-open").addEventListener("click", () => adding.show(plan.machines, byId("model").value));

startShell({
  onState: ({ state }) => {
    ({ replicas, models } = state);
    plan = { wanted: {}, wishes: {}, machines: {}, ...state.fleet };
    const names = [...new Set([...Object.keys(replicas), ...Object.keys(plan.wishes)])];
    const rows = names
      .map((name) => [name, replicas[name], plan.wishes[name]])
      .sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
    byId("fleet-loading").hidden = true;
    byId("fleet-empty").hidden = rows.length > 0;
    const ready = rows.filter(([, r]) => r?.state === "ready").length;
    setText(byId("fleet-sum"), `${count(ready)} of ${plural(rows.length, "worker")} ready, all models`);
    if (steered) byId("add-open").disabled = places(plan.machines).length === 0;
    byId("fleet-tables").hidden = false;
    drawWanted(plan.wanted);
    drawMachines(plan.machines, state.time_s);
    keyed(
      list,
      rows,
      ([name, r]) => `${name} ${r ? "speaks" : "is silent"}`,
      create,
      (node, item) => update(node, item, state.time_s),
    );
  },
});

function drawWanted(wanted) {
  keyed(
    byId("wanted-rows"),
    Object.entries(wanted),
    ([model]) => model,
    ([model]) => el("tr", {}, el("th", { scope: "row", text: model }), el("td", { class: "num" }), el("td", { class: "num" }), el("td")),
    (node, [, of]) => {
      const [, wants, runs, differs] = node.children;
      setText(wants, count(of.wanted));
      setText(runs, count(of.running));
      setText(differs, of.differs || "nothing");
      differs.classList.toggle("pending", Boolean(of.differs));
    },
  );
}

function drawMachines(machines, now) {
  const rows = Object.entries(machines);
  setText(byId("machines-sum"), rows.length ? plural(rows.length, "machine") : "none has been heard of");
  keyed(
    byId("machine-rows"),
    rows,
    ([name]) => name,
    ([name]) => el("tr", {}, el("th", { scope: "row" }, name, el("span", { class: "soft" })), el("td"), el("td")),
    (node, [name, machine]) => {
      const [head, devices, here] = node.children;
      const silent = machine.silent_since_s === undefined ? "" : `silent since ${ago(machine.silent_since_s, now)}`;
      const host = machine.host === name ? "" : machine.host;
      const orchestrated = machine.orchestrated ? "an orchestrator decides how many" : "";
      setText(head.lastElementChild, [host, orchestrated, silent].filter(Boolean).join(", "));
      const free = (d) => `${d.label}: ${bytes(d.free_bytes)} of ${bytes(d.total_bytes)}`;
      setText(devices, machine.devices.map(free).join("; ") || "not known yet");
      setText(here, machine.replicas.join(", ") || "none");
    },
  );
}

function create([name, r, wish]) {
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
      el("a", { class: "soft", href: historyOf(name, r?.model ?? wish.model), text: "History", "aria-label": `History of ${name}` }),
      buttons,
    ),
    el("p", { class: "differs", hidden: true }),
    el("p", { class: "detail soft" }),
    el("dl", { class: "facts" }),
    r ? el("div", { class: "batching" }, part("Batch size"), part("Triggers")) : null,
  );
}

/** The page of history with what this worker and its device recorded. */
function historyOf(name, model) {
  const query = new URLSearchParams({ model, replica: name });
  for (const metric of ["output_tokens", "batch_size", "step_ms", "kv", "utilization", "memory", "temperature", "power"]) query.append("metric", metric);
  return `/history/?${query}`;
}

const part = (title) => el("section", {}, el("h3", { text: title }), el("p", { class: "now-line" }), el("ol"));

function steer(name, command) {
  if (!command) return;
  if (command in TUNES) tuning.show(name, command, replicas[name]);
  else if (command in CHANGES) changing.show(name, command, plan.machines[plan.wishes[name]?.machine]?.drain_s);
  else controlling.show(name, command);
}

function update(node, [name, r, wish], now) {
  const lost = r?.state === "lost";
  const state = node.querySelector(".state");
  const word = wish && (!r || lost || ["waiting", "stopping"].includes(wish.state)) ? wish.state : r.state;
  setAttribute(state, "data-state", word);
  setText(state, `${MORE_SIGNS[word] ?? "?"} ${word}`);
  setText(node.querySelector(".where"), r ? `${r.model} on ${r.host}, pid ${r.pid}` : [wish.model, wish.machine].filter(Boolean).join(" on "));
  drawDifference(node.querySelector(".differs"), wish, now);
  const detail = node.querySelector(".detail");
  setText(detail, lost ? `Silent for ${brief(Math.max(0, Math.round(now - r.heard_s)))}.` : (r?.detail ?? ""));
  detail.hidden = !detail.textContent || detail.textContent === wish?.differs;
  keyed(node.querySelector(".facts"), [...(r && !lost ? served(r, now) : []), ...placed(wish)], ([label]) => label, createFact, updateFact);
  drawButtons(node.querySelector(".worker-buttons"), name, r, wish);
  if (r) drawBatching(node.querySelector(".batching"), r, now, lost);
}

/** What a worker is not as it is wanted, since when, and until when that may take. */
function drawDifference(line, wish, now) {
  const lasted = wish?.since_s ? Math.round(now - wish.since_s) : 0;
  const since = lasted < 3 ? "" : `, for ${brief(lasted)}`;
  const left = wish?.until_s ? Math.max(0, Math.round(wish.until_s - now)) : 0;
  const until = !left ? "" : wish.state === "waiting" ? `; next start in ${brief(left)}` : `; at most ${brief(left)} more`;
  setText(line, wish?.differs ? `${wish.differs.replace(/\.$/, "")}${since}${until}.` : "");
  line.hidden = !wish?.differs;
}

function served(r, now) {
  const current = models[r.model]?.policy.revision ?? r.policy_revision;
  const pending = current > r.policy_revision ? `, ${current} pending` : "";
  const running = ["running", `${count(r.batch_size)} of ${count(r.max_batch_size)} slots`, r.batch_size / Math.max(1, r.max_batch_size)];
  const rows = facts(r, now).map((row) => (row[0] === "policy seen" ? [row[0], row[1] + pending] : row));
  return [running, ...rows, ["mode", r.mode], ["sizing", r.sizing], ...restarts(r)];
}

function placed(wish) {
  if (!wish) return [];
  const who = wish.own ? "by its machine's settings" : wish.machine ? "by an operator" : "by hand";
  const rows = [["placement", [wish.machine, wish.device_label].filter(Boolean).join(", ") || "not known"], ["started", who]];
  if (wish.settings) rows.push(["model's settings", wish.settings]);
  if (wish.notes) rows.push(["told by operators", wish.notes]);
  return rows;
}

const restarts = (r) =>
  Object.keys(r.restarts).length
    ? [["restarts", Object.entries(r.restarts).map(([why, n]) => `${count(n)} ${why}`).join(", ")]]
    : [];

const isOrchestrated = (wish) => plan.machines[wish.machine]?.orchestrated;

function drawButtons(parent, name, r, wish) {
  const leaves = wish && !wish.wanted;
  const known = (r && !leaves && COMMANDS[r.state]) || [];
  const changes = !wish ? [] : leaves && wish.state === "stopped" ? ["start"] : [
    ...(wish.can_restart && r && (!leaves || isOrchestrated(wish)) ? ["restart"] : []),
    ...(wish.can_stop && !(leaves && isOrchestrated(wish)) ? ["remove"] : []),
  ];
  const commands = steered ? [...known, ...(known.length ? Object.keys(TUNES) : []), ...changes] : [];
  keyed(
    parent,
    commands,
    (c) => c,
    (c) => {
      const text = TUNES[c] ?? CHANGES[c] ?? `${c[0].toUpperCase()}${c.slice(1)}`;
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

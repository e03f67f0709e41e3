// The live page: takes state from the feed and draws it.

import { drawBatches } from "./batch.js";
import { Chart } from "./charts.js";
import { ControlDialog, SwitchDialog } from "./dialogs.js";
import { byId, el, keyed, setText } from "./dom.js";
import { brief, count, rate } from "./format.js";
import { column, split } from "./rows.js";
import { learnTenants, tenantColour, tenantHatched } from "./palette.js";
import { drawBackpressure, drawFigures, drawPolicy, drawSplit } from "./panels.js";
import { drawService } from "./service.js";
import { announce, chosenModel, offerModels, startShell } from "./shell.js";
import { Uptake } from "./uptake.js";
import { drawActions, drawWorkers } from "./workers.js";

const WHOLE = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5].map((power) => n * 10 ** power)).sort((a, b) => a - b);
const seconds = (value) => (value === 0 ? "0" : brief(value));
const charts = {
  queue: new Chart(byId("chart-queue"), { format: count, least: 5, steps: WHOLE, stacked: true }),
  tokens: new Chart(byId("chart-tokens"), { format: rate, least: 10 }),
  flow: new Chart(byId("chart-flow"), { format: rate, least: 1, legend: byId("legend-flow") }),
  waits: new Chart(byId("chart-waits"), { format: seconds, least: 0.01, legend: byId("legend-waits") }),
};

let snapshot = null;
let drawnRow = "";
let said = {};
const uptake = new Uptake(announce);
const switching =
  byId("switch-dialog") && new SwitchDialog((answer, began) => uptake.begin(answer.model, answer, began));
const controlling = byId("control-dialog") && new ControlDialog((answer) => announce(answer.message));

const splitBy = () => document.querySelector('input[name="split"]:checked').value;

function draw() {
  const { state, history } = snapshot;
  offerModels(Object.keys(state.models));
  const name = chosenModel();
  const model = state.models[name];
  learnTenants(state.tenants);
  byId("empty").hidden = Boolean(model);
  byId("figures").hidden = !model;
  const replicas = Object.entries(state.replicas).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  drawWorkers(byId("workers"), replicas, state.time_s, (replica, command) => controlling.show(replica, command));
  drawActions(byId("actions"), state.actions, state.time_s);
  if (model)
    drawModel(
      name,
      model,
      replicas.filter(([, r]) => r.model === name),
      history[name],
      state.time_s,
    );
}

function drawModel(name, model, replicas, rows, now) {
  const live = replicas.filter(([, r]) => r.state !== "lost");
  drawFigures(model, live);
  drawSplit(model, splitBy());
  drawBackpressure(model.backpressure);
  drawService(snapshot.state.service[name] ?? {});
  uptake.draw(name, model.policy, drawPolicy(model.policy, replicas));
  drawBatches(byId("batches"), live);
  drawLegend(live);
  setText(byId("batch-sum"), live.length ? "" : "No worker runs this model; requests wait until one starts.");
  if (byId("switch")) byId("switch").disabled = false;
  drawCharts(name, rows, now);
  tellChanges(name, model);
}

function drawLegend(replicas) {
  const names = [...new Set(replicas.flatMap(([, r]) => r.slots.map((slot) => slot[1])))].sort((a, b) =>
    a.localeCompare(b, "en", { numeric: true }),
  );
  keyed(
    byId("legend"),
    names.slice(0, 12),
    (n) => n,
    (n) => el("li", {}, el("i", { class: "swatch" }), ` ${n}`),
    (node, n) => {
      node.firstElementChild.style.setProperty("--colour", tenantColour(n));
      node.firstElementChild.classList.toggle("hatched", tenantHatched(n));
    },
  );
}

function drawCharts(name, rows, now) {
  const row = `${name} ${splitBy()} ${rows.length ? rows[rows.length - 1][0] : 0}`;
  if (row === drawnRow) return;
  drawnRow = row;
  const times = column(rows, "time");
  const line = (label, colour, values, dash) => ({ label, colour, values: column(rows, values), dash });
  charts.queue.draw(times, split(rows, splitBy()), now);
  charts.tokens.draw(times, [line("output tokens/s", "var(--chart-1)", "tokens")], now);
  charts.flow.draw(
    times,
    [line("arriving", "var(--chart-1)", "arrivals"), line("ending", "var(--chart-2)", "completions", [6, 3])],
    now,
  );
  charts.waits.draw(
    times,
    [
      line("TTFT p99", "var(--chart-2)", "ttft99", [6, 3]),
      line("TTFT p50", "var(--chart-1)", "ttft50"),
      line("queue p50", "var(--chart-3)", "queue", [2, 3]),
    ],
    now,
  );
}

/** Says aloud what an operator must not miss: the level and the policy, when they change. */
function tellChanges(name, model) {
  const now = { name, level: model.backpressure.level, revision: model.policy.revision };
  if (said.name === name && said.level !== now.level)
    announce(`Backpressure is ${now.level} of 4, ${model.backpressure.name}. ${model.backpressure.reason}`);
  else if (said.name === name && said.revision !== now.revision)
    announce(`The policy of ${name} is ${model.policy.name}, revision ${now.revision}.`);
  said = now;
  document.title = `${model.backpressure.level ? `(${model.backpressure.name}) ` : ""}${count(model.depth)} waiting · ${name} · Penstock`;
}

// Controls

for (const radio of document.querySelectorAll('input[name="split"]'))
  radio.addEventListener("change", () => snapshot && draw());
byId("switch")?.addEventListener("click", () => {
  const name = chosenModel();
  switching.show(name, snapshot.state.models[name].policy);
});

startShell({
  onState: (next) => {
    snapshot = next;
    draw();
  },
  onTheme: () => Object.values(charts).forEach((chart) => chart.recolour()),
  onModel: () => snapshot && draw(),
});

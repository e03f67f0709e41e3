// The page of requests: what runs and what waits now, fetched every two seconds while somebody looks.

import { byId, el, keyed, setAttribute, setText } from "./dom.js";
import { brief, count, plural } from "./format.js";
import { PRIORITIES } from "./palette.js";
import { chosenModel, startShell } from "./shell.js";

const PERIOD_MS = 2000;
const SHOWN = 20;
let asking = false;
let asked = 0;

startShell({
  onState: () => {
    if (!asking && !document.hidden && Date.now() - asked > PERIOD_MS && chosenModel()) ask();
  },
});
if (!chosenModel()) setText(byId("now-sum"), "No model is deployed yet.");

async function ask() {
  asking = true;
  asked = Date.now();
  try {
    const query = new URLSearchParams({ model: chosenModel() });
    const answer = await fetch(`/api/v1/operator/requests/live?${query}`, { headers: { Accept: "application/json" } });
    if (answer.ok) draw(await answer.json());
    else setText(byId("now-sum"), "The queue's store does not answer.");
  } catch {
    setText(byId("now-sum"), "The server does not answer.");
  } finally {
    asking = false;
  }
}

function draw({ running, waiting, num_waiting: numWaiting, time_s: now }) {
  const shown = waiting.slice(0, SHOWN);
  const more = waiting.length < numWaiting ? `${shown.length} of them, drawn at random, are shown` : "longest first";
  const rest = shown.length < numWaiting && waiting.length >= numWaiting ? `, the first ${shown.length} shown` : "";
  setText(
    byId("now-sum"),
    `${plural(running.length, "request")} running, ${count(numWaiting)} waiting${numWaiting ? `, ${more}${rest}` : ""}`,
  );
  const rows = [...running.slice(0, 3 * SHOWN), ...shown];
  byId("live-rows").hidden = !rows.length;
  keyed(byId("live-rows").tBodies[0], rows, (r) => r.id, create, (node, r) => update(node, r, now));
}

function create(r) {
  const href = `/requests/${encodeURIComponent(r.id)}/`;
  return el(
    "tr",
    {},
    el("td", {}, el("a", { class: "mono id", href, text: r.id })),
    el("td", {}, el("span", { class: "badge" })),
    el("td", { text: r.tenant }),
    el("td", { text: PRIORITIES[r.priority] ?? "" }),
    el("td", { class: "num", text: count(r.prompt_tokens) }),
    el("td", { class: "num" }),
    el("td", { class: "nowrap" }),
  );
}

function update(node, r, now) {
  const badge = node.cells[1].firstElementChild;
  setAttribute(badge, "data-state", r.state);
  setText(badge, r.state);
  setText(node.cells[5], `${count(r.output_tokens)} / ${count(r.max_tokens)}`);
  const waits = r.arrival_s === null ? "" : `waits ${brief(Math.max(0, now - r.arrival_s))}`;
  setText(node.cells[6], r.replica || waits);
}

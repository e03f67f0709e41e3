// The running batch as a picture of slots: who runs, in the tenant's colour, and how far the output has come.

import { el, keyed, setAttribute, setText, setVariable } from "./dom.js";
import { count } from "./format.js";
import { PRIORITIES, tenantColour, tenantHatched } from "./palette.js";

const COMPACT_FROM = 33;
const places = new Map();

/** Keeps a request in the cell where it began, for as long as it runs. */
function arrange(replica, slots, size) {
  const before = places.get(replica) ?? [];
  const running = new Map(slots.map((slot) => [slot[0], slot]));
  const cells = Array.from({ length: Math.max(size, slots.length) }, (_, i) => running.get(before[i]) ?? null);
  const placed = new Set(cells.filter(Boolean).map((slot) => slot[0]));
  let free = 0;
  for (const slot of slots) {
    if (placed.has(slot[0])) continue;
    while (cells[free]) free += 1;
    cells[free] = slot;
  }
  places.set(
    replica,
    cells.map((slot) => slot?.[0]),
  );
  return cells;
}

export function drawBatches(parent, replicas) {
  for (const name of places.keys()) if (!replicas.some(([replica]) => replica === name)) places.delete(name);
  keyed(parent, replicas, ([name]) => name, createBatch, updateBatch);
}

function createBatch([name]) {
  return el(
    "div",
    { class: "batch" },
    el("p", { class: "batch-head" }, el("b", { text: name }), " ", el("span", { class: "soft" })),
    el("ul", { class: "slots", "aria-label": `Requests running on ${name}` }),
  );
}

function updateBatch(node, [name, replica]) {
  const size = Math.max(replica.max_batch_size, replica.batch_size);
  const hidden = replica.batch_size - replica.slots.length;
  setText(
    node.querySelector(".soft"),
    `${count(replica.batch_size)} of ${count(size)} slots, ${count(replica.batch_tokens)} tokens in context, ${replica.mode}` +
      (hidden > 0 ? `, ${count(hidden)} more not drawn` : ""),
  );
  const list = node.querySelector(".slots");
  list.classList.toggle("compact", size >= COMPACT_FROM);
  const cells = arrange(name, replica.slots, Math.min(size, 256)).map((slot, i) => [i, slot]);
  keyed(
    list,
    cells,
    ([i]) => i,
    createSlot,
    (cell, [, slot]) => updateSlot(cell, slot),
  );
}

function createSlot() {
  return el(
    "li",
    { class: "slot" },
    el("span", { class: "slot-name" }),
    el("span", { class: "slot-priority" }),
    el("span", { class: "bar" }, el("i")),
    el("span", { class: "slot-tokens" }),
  );
}

function updateSlot(node, slot) {
  const [name, priority, bar, tokens] = node.children;
  node.classList.toggle("free", !slot);
  if (!slot) {
    setText(name, "free");
    setText(priority, "");
    setText(tokens, "");
    setVariable(bar, "--share", "0%");
    node.removeAttribute("title");
    return;
  }
  const [id, tenant, level, promptTokens, output, most] = slot;
  setText(name, tenant);
  setText(priority, PRIORITIES[level] ?? "");
  setText(tokens, `${count(output)} / ${count(most)}`);
  setVariable(node, "--colour", tenantColour(tenant));
  node.classList.toggle("hatched", tenantHatched(tenant));
  setVariable(bar, "--share", `${Math.min(100, (100 * output) / Math.max(1, most)).toFixed(1)}%`);
  setAttribute(
    node,
    "title",
    `${id}: ${tenant}, ${PRIORITIES[level]}, prompt ${count(promptTokens)} tokens, output ${count(output)} of at most ${count(most)}`,
  );
}

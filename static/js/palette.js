// Colours of priorities and tenants. Chosen to differ for colour-blind eyes; a name or number always stands beside them.

export const PRIORITIES = ["critical", "realtime", "high", "normal", "low", "bulk"];
const TENANT_COLOURS = 8;
const order = new Map();

export const priorityColour = (level) => `var(--priority-${level})`;

/** Tenants take colours in the order of their creation, so that a colour stays theirs. */
export function learnTenants(names) {
  for (const name of names) if (!order.has(name)) order.set(name, order.size);
}

export function tenantIndex(name) {
  if (!order.has(name)) order.set(name, order.size);
  return order.get(name);
}

export const tenantColour = (name) => `var(--tenant-${tenantIndex(name) % TENANT_COLOURS})`;

/** From the ninth tenant on colours repeat, with hatching. */
export const tenantHatched = (name) => Math.floor(tenantIndex(name) / TENANT_COLOURS) % 2 === 1;

/** The computed value of a colour, for canvases. */
export function resolveColour(value) {
  const probe = document.createElement("i");
  probe.style.color = value;
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

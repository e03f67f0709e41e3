// What the page holds: a snapshot that numbered updates turn into the next one. Mirrors dashboard/state.py.

export const HISTORY_ROWS = 300;

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

/** A JSON merge patch (RFC 7396) applied; the target itself stays as it is. */
export function merge(target, patch) {
  const merged = isObject(target) ? { ...target } : {};
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete merged[key];
    else merged[key] = isObject(value) ? merge(merged[key], value) : value;
  }
  return merged;
}

/** The snapshot after an update, or null where an update before it is missing. */
export function apply(snapshot, update) {
  if (!snapshot || update.epoch !== snapshot.epoch || update.seq !== snapshot.seq + 1) return null;
  const state = merge(snapshot.state, update.patch);
  const history = {};
  for (const model of Object.keys(state.models)) {
    const rows = snapshot.history[model] ?? [];
    history[model] = model in update.rows ? [...rows, update.rows[model]].slice(-HISTORY_ROWS) : rows;
  }
  return { ...snapshot, seq: update.seq, state, history };
}

// Follows a switch until every worker has taken it up, and says how long that took.

import { byId, setAttribute, setText } from "./dom.js";
import { duration, plural } from "./format.js";

export class Uptake {
  constructor(announce) {
    this.announce = announce;
    this.pending = new Map();
    this.done = new Map();
  }

  /** The server's answer to a switch of this page; `began` is the `performance.now()` of the click. */
  begin(model, answer, began) {
    this.done.delete(model);
    this.pending.set(model, { ...answer, began });
    this.announce(`${answer.name} is revision ${answer.revision} of ${model}.`);
  }

  /** `live` workers, of which those named in `behind` claimed last under an older revision. */
  draw(model, policy, { live, behind }) {
    const mine = this.pending.get(model);
    if (mine && policy.revision > mine.revision) this.pending.delete(model);
    else if (mine && mine.state === "applied" && policy.revision === mine.revision) {
      const late = behind.filter((name) => !mine.confirmed[name]);
      if (!late.length) this.finish(model, mine, live);
    }
    this.show(this.sentence(model, policy, live, behind));
  }

  finish(model, mine, live) {
    this.pending.delete(model);
    const times = Object.values(mine.confirmed).filter((ms) => typeof ms === "number" && ms > 0);
    const within = times.length === live && live ? Math.max(...times) / 1000 : (performance.now() - mine.began) / 1000;
    const text = live
      ? `${live === 1 ? "The worker" : `All ${live} workers`} took up revision ${mine.revision} within ${duration(within)}.`
      : `Revision ${mine.revision} is in force; no worker runs.`;
    this.done.set(model, { revision: mine.revision, text });
    this.announce(text);
  }

  sentence(model, policy, live, behind) {
    const mine = this.pending.get(model);
    const done = this.done.get(model);
    if (mine && mine.state !== "applied")
      return ["wait", `Revision ${mine.revision} is written down; it is applied as soon as the queue's store answers.`];
    if (mine)
      return ["wait", `Revision ${mine.revision}: ${plural(live - behind.length, "worker")} of ${live} took it up…`];
    if (done?.revision === policy.revision) return ["done", `✓ ${done.text}`];
    if (!live) return ["none", "No worker runs."];
    if (behind.length)
      return [
        "wait",
        `${live - behind.length} of ${plural(live, "worker")} took it up; ${behind.join(", ")} will with the next claim.`,
      ];
    return [
      "done",
      `✓ ${live === 1 ? "The worker claims" : `All ${live} workers claim`} by revision ${policy.revision}.`,
    ];
  }

  show([state, text]) {
    const node = byId("uptake");
    setAttribute(node, "data-state", state);
    setText(node, text);
  }
}

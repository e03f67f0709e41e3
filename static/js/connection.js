// Whether the figures are fresh: the sign in the header, the banner below it, and dimmed figures when they are old.

import { byId, el, setAttribute, setText } from "./dom.js";
import { clock } from "./format.js";

const LABELS = {
  live: "Live",
  connecting: "Connecting",
  stale: "Stale",
  "signed-out": "Signed out",
  forbidden: "No access",
};

export class Connection {
  constructor() {
    this.heard = null;
    this.problem = null;
    this.faults = {};
  }

  /** The feed's status; `heard` is when it last spoke (ms), or null where it never did. */
  showStatus(status, heard) {
    setAttribute(byId("connection"), "data-state", status);
    setText(byId("connection").querySelector(".label"), LABELS[status]);
    this.problem = status === "live" ? null : explain(status, heard);
    this.heard = heard;
    this.draw();
  }

  /** What the server itself cannot reach, as the document names it. */
  showFaults(faults) {
    if (JSON.stringify(faults) === JSON.stringify(this.faults)) return;
    this.faults = faults;
    this.draw();
  }

  draw() {
    const old = this.problem !== null || Boolean(this.faults.redis ?? this.faults.dashboard);
    document.body.classList.toggle("stale", old && Boolean(this.heard));
    const sentences = Object.values(this.faults).map((f) => [`${f.message} Since ${clock(f.since_s * 1000)}.`]);
    const lines = this.problem ? [this.problem] : sentences;
    byId("banner").hidden = lines.length === 0;
    byId("banner").replaceChildren(...lines.map((parts) => el("p", {}, ...parts.flatMap((part) => [part, " "]))));
  }
}

/** A banner's line: text and links. */
function explain(status, heard) {
  if (status === "stale") {
    return [`The feed is stale since ${clock(heard)}. The figures below are the last ones heard; trying again.`];
  }
  if (status === "signed-out") {
    const back = `/login/?next=${encodeURIComponent(location.pathname + location.search)}`;
    return ["Your session has ended.", el("a", { href: back, text: "Sign in again" })];
  }
  if (status === "forbidden") {
    return ["Your account may no longer see this page. Ask an administrator for the group viewer."];
  }
  return ["The server does not answer yet. Trying again."];
}

// Workers with their state and what their device says, and the list of recent operator actions.

import { byId, el, keyed, setAttribute, setText, setVariable } from "./dom.js";
import { NONE, ago, brief, bytes, count, duration, percent, plural, rate } from "./format.js";

export const SIGNS = { ready: "●", starting: "◌", paused: "❚❚", draining: "◒", stopped: "○", unhealthy: "✕", failed: "✕", lost: "✕" };
export const COMMANDS = { ready: ["pause", "drain"], paused: ["resume", "drain"], draining: ["resume"], unhealthy: ["pause", "drain"] };
const SOURCES = { nvml: "NVML", host: "host" };

export function drawWorkers(parent, replicas, now, onCommand) {
  const control = parent.dataset.control !== undefined;
  byId("workers-empty").hidden = replicas.length > 0;
  const ready = replicas.filter(([, r]) => r.state === "ready").length;
  setText(byId("workers-sum"), replicas.length ? `${count(ready)} of ${plural(replicas.length, "worker")} ready` : "");
  keyed(
    parent,
    replicas,
    ([name]) => name,
    (item) => createWorker(item, control, onCommand),
    (node, item) => updateWorker(node, item, now),
  );
}

function createWorker([name], control, onCommand) {
  const buttons = el("span", { class: "worker-buttons" });
  if (control)
    buttons.addEventListener("click", (event) => {
      const command = event.target.closest("button")?.dataset.key;
      if (command) onCommand(name, command);
    });
  return el(
    "li",
    { class: "worker" },
    el(
      "div",
      { class: "worker-head" },
      el("b", { text: name }),
      el("span", { class: "state" }),
      el("span", { class: "soft where" }),
      buttons,
    ),
    el("p", { class: "detail soft" }),
    el("dl", { class: "facts" }),
  );
}

function updateWorker(node, [name, r], now) {
  const state = node.querySelector(".state");
  setAttribute(state, "data-state", r.state);
  setText(state, `${SIGNS[r.state] ?? "?"} ${r.state}`);
  setText(node.querySelector(".where"), `${r.model} on ${r.host}, pid ${r.pid}`);
  const detail =
    r.state === "lost"
      ? `Silent for ${brief(Math.max(0, Math.round(now - r.heard_s)))}; its requests go to other workers when its lease ends.`
      : r.detail;
  const line = node.querySelector(".detail");
  setText(line, detail);
  line.hidden = !detail;
  keyed(node.querySelector(".facts"), facts(r, now), ([label]) => label, createFact, updateFact);
  keyed(
    node.querySelector(".worker-buttons"),
    control(node) ? (COMMANDS[r.state] ?? []) : [],
    (c) => c,
    (c) =>
      el("button", {
        type: "button",
        class: "button small",
        text: `${c[0].toUpperCase()}${c.slice(1)}`,
        "aria-label": `${c} ${name}`,
      }),
    () => {},
  );
}

const control = (node) => node.parentElement === null || node.parentElement.dataset.control !== undefined;

const guesses = (r) =>
  `${percent(r.accepted_tokens / r.draft_tokens)} right, ${rate(r.accepted_per_step)} accepted a step`;

export function facts(r, now) {
  if (r.state === "lost") return [];
  const t = r.telemetry;
  const rows = [
    ["output", `${rate(r.tokens_per_s)} tokens/s`],
    ["step", r.step_ms_p50 ? `${duration(r.step_ms_p50 / 1000)} p50, ${duration(r.step_ms_p99 / 1000)} p99` : NONE],
    ...(r.kv_blocks_total
      ? [
          [
            "KV blocks",
            `${count(r.kv_blocks_used)} of ${count(r.kv_blocks_total)} × ${r.kv_block_size} tokens`,
            r.kv_blocks_used / r.kv_blocks_total,
          ],
        ]
      : []),
    ["preempted", count(r.preemptions)],
    ...(r.draft_tokens ? [["guesses", guesses(r)]] : []),
    ["policy seen", `${r.policy ? `${r.policy}, ` : ""}revision ${r.policy_revision}`],
    ["up", duration(Math.max(0, Math.round(now - r.started_s)))],
  ];
  if (!t) return [...rows, ["telemetry", "none"]];
  rows.push(["telemetry", `${SOURCES[t.source] ?? t.source}: ${t.device}${t.mig ? `, ${t.mig}` : ""}`]);
  if (t.lost) return [...rows, ["device", "lost"]];
  if (t.stale_s) rows.push(["read", `${duration(t.stale_s)} ago: the driver does not answer`]);
  if (t.source === "host" && t.detail) rows.push(["why the host", t.detail]);
  if (t.utilization_percent !== undefined)
    rows.push(["utilisation", percent(t.utilization_percent / 100), t.utilization_percent / 100]);
  if (t.memory_used_bytes !== undefined) {
    const share = t.memory_total_bytes ? t.memory_used_bytes / t.memory_total_bytes : undefined;
    rows.push([
      "memory",
      bytes(t.memory_used_bytes) + (t.memory_total_bytes ? ` of ${bytes(t.memory_total_bytes)}` : ""),
      share,
    ]);
  }
  if (t.temperature_c !== undefined) rows.push(["temperature", `${Math.round(t.temperature_c)} °C`]);
  if (t.power_w !== undefined) {
    const limit = t.power_limit_w ? ` of ${Math.round(t.power_limit_w)}` : "";
    rows.push(["power", `${Math.round(t.power_w)}${limit} W`]);
  }
  if (t.sm_clock_mhz !== undefined) rows.push(["clock", `${count(Math.round(t.sm_clock_mhz))} MHz`]);
  if (t.ecc_uncorrected) rows.push(["memory errors", count(t.ecc_uncorrected)]);
  if (t.throttle_reasons?.length) rows.push(["throttled", t.throttle_reasons.join(", ")]);
  return rows;
}

export const createFact = ([label]) =>
  el("div", {}, el("dt", { text: label }), el("dd", {}, el("span"), el("i", { class: "level-bar" })));

export function updateFact(node, [, value, share]) {
  const [text, bar] = node.lastElementChild.children;
  setText(text, value);
  bar.hidden = share === undefined;
  if (share !== undefined) setVariable(bar, "--share", `${(100 * Math.min(1, share)).toFixed(1)}%`);
}

const VERBS = {
  "policy.switch": "switched the policy of",
  "replica.pause": "paused worker",
  "replica.resume": "resumed worker",
  "replica.drain": "drained worker",
  "replica.set_mode": "set the batch mode of worker",
  "replica.set_batch_size": "set the batch size of worker",
  "replica.sizing": "set the sizing of worker",
  "replica.answer": "was answered by worker",
  "replica.add": "added replica",
  "replica.remove": "removed replica",
  "replica.restart": "restarted replica",
  "tenant.create": "created tenant",
  "tenant.update": "changed tenant",
  "tenant.delete": "deleted tenant",
  "tenant.suspend": "suspended tenant",
  "tenant.resume": "let in tenant",
  "key.create": "created key",
  "key.revoke": "revoked key",
  "deployment.create": "deployed model",
  "deployment.update": "changed model",
  "request.cancel": "cancelled request",
  "batch.cancel": "cancelled batch",
  "what_if.ask": "had policies replayed for",
  "token.create": "made token",
  "token.revoke": "revoked token",
  "user.password": "set the password of",
  "alert.acknowledge": "acknowledged the alert",
  "alertrule.update": "changed the alert rule",
};

export function drawActions(parent, actions, now) {
  byId("actions-empty").hidden = actions.length > 0;
  keyed(
    parent,
    actions,
    (a) => a.id,
    createAction,
    (node, a) => {
      const [when, result] = [node.querySelector("time"), node.querySelector(".result")];
      setText(when, ago(a.when_s, now));
      setText(result, outcome(a));
      result.hidden = !result.textContent;
      setAttribute(result, "data-state", a.state ?? "");
    },
  );
}

function createAction(a) {
  const when = new Date(a.when_s * 1000);
  return el(
    "li",
    {},
    el(
      "p",
      {},
      el("b", { text: a.who || "system" }),
      ` ${VERBS[a.what] ?? a.what.replace(".", " ")} `,
      el("span", { text: a.target }),
      a.revision ? el("span", { class: "soft", text: ` r${a.revision}` }) : null,
      el("time", { class: "soft", datetime: when.toISOString(), title: when.toLocaleString() }),
    ),
    a.text ? el("p", { class: "change", text: a.text }) : null,
    a.reason ? el("p", { class: "soft reason", text: `“${a.reason}”` }) : null,
    el("p", { class: "result soft" }),
  );
}

function outcome(a) {
  if (a.what !== "policy.switch") return "";
  if (a.state === "pending") return "Waits for the queue's store to answer.";
  if (a.state === "applying") return "Being applied.";
  if (a.state === "superseded") return "A later switch overtook it.";
  const took = a.seconds === undefined ? "Applied" : `Applied in ${duration(a.seconds)}`;
  const moved = a.num_moved === undefined ? "" : `, ${plural(a.num_moved, "request")} re-ordered`;
  const workers = a.workers ? `, ${count(a.workers_ok)} of ${plural(a.workers, "worker")} confirmed` : "";
  return `${took}${moved}${workers}.`;
}

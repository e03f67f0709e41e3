// The dialogs that add a replica, and that remove or restart one.

import { ReasonDialog, problem } from "./dialogs.js";
import { byId, el, setText } from "./dom.js";
import { bytes } from "./format.js";

/** Places where a replica could run: only what machines report; an orchestrator's machines are one place together. */
export function places(machines) {
  const heard = Object.entries(machines).filter(([, machine]) => machine.silent_since_s === undefined);
  const pods = new Map();
  for (const [name, machine] of heard) if (machine.orchestrated) pods.set(name.replace(/\d+$/, ""), name);
  return [
    ...heard
      .filter(([, machine]) => !machine.orchestrated)
      .flatMap(([name, machine]) =>
        machine.devices.map((device) => ({
          value: `${name}|${device.name}`,
          text: `${name}, ${device.label}: ${bytes(device.free_bytes)} free`,
        })),
      ),
    ...[...pods.values()].map((name) => ({ value: `${name}|auto`, text: `one more beside ${name}, by its orchestrator` })),
  ];
}

class FieldDialog extends ReasonDialog {
  clear() {
    for (const line of this.form.querySelectorAll(".field-problem")) line.hidden = true;
    for (const field of this.form.querySelectorAll('[aria-invalid="true"]')) field.removeAttribute("aria-invalid");
  }

  open() {
    this.clear();
    super.open();
  }

  refused(answer) {
    this.clear();
    const fields = Object.entries(answer.fields ?? {}).filter(([name]) => this.form.elements[name]);
    for (const [name, sentence] of fields) {
      const field = this.form.elements[name];
      field.setAttribute("aria-invalid", "true");
      problem(byId(`${field.id}-problem`), sentence);
    }
    if (fields.length) this.form.elements[fields[0][0]].focus();
    problem(this.problem, fields.length ? "" : answer.error);
  }
}

export class AddDialog extends FieldDialog {
  constructor(onDone) {
    super("add", onDone);
  }

  show(machines, model) {
    this.open();
    byId("add-place").replaceChildren(...places(machines).map(({ value, text }) => el("option", { value, text })));
    if (model) byId("add-model").value = model;
    byId("add-model").focus();
  }

  url() {
    return this.form.dataset.action;
  }
}

const TITLES = { remove: "Remove", restart: "Restart", start: "Start" };
const EFFECTS = {
  remove: "It claims nothing more and finishes what runs; what is left after the limit goes back to the queue and is resumed elsewhere. Then its process ends.",
  restart: "It claims nothing more, finishes what runs for as long as its machine's settings allow, ends, and starts anew with what operators told it.",
  start: "Its machine's settings ask for it, and an operator removed it. It is started again.",
};

export class ChangeDialog extends FieldDialog {
  constructor(onDone) {
    super("change", onDone);
  }

  /** `act` is remove, restart or start; `drain` is the machine's own limit, in seconds. */
  show(replica, act, drain) {
    Object.assign(this, { replica, act });
    this.open();
    setText(byId("change-title"), `${TITLES[act]} ${replica}`);
    setText(byId("change-effect"), EFFECTS[act]);
    byId("change-drain").hidden = act !== "remove";
    byId("drain_s").disabled = act !== "remove";
    const usual = drain === undefined ? "as its machine's settings have it" : `${drain} s`;
    setText(byId("drain_s-hint"), `Empty: ${usual}. 0: what runs goes back to the queue at once.`);
    setText(this.confirm, `${TITLES[act]} ${replica}`);
    (act === "remove" ? byId("drain_s") : this.reason).focus();
  }

  url() {
    const act = this.act === "start" ? "restart" : this.act;
    return this.form.dataset.action.replace("REPLICA", encodeURIComponent(this.replica)).replace("ACT", act);
  }
}

// Switching a policy and steering a worker: a native dialog asks for a reason, a POST carries it out.

import { byId, setText } from "./dom.js";

export const problem = (node, text) => {
  setText(node, text);
  node.hidden = !text;
};

/** Posts a form; gives {ok, ...answer}, and a sentence in `error` where it failed. */
async function post(url, form) {
  try {
    const answer = await fetch(url, {
      method: "POST",
      body: new FormData(form),
      headers: { Accept: "application/json" },
      redirect: "error",
    });
    const isJson = answer.headers.get("content-type")?.includes("json");
    if (isJson) return { ok: answer.ok, ...(await answer.json()) };
    if (answer.status === 403) return { ok: false, error: "This form is out of date. Load the page again and repeat." };
    return {
      ok: false,
      error: `The server answered with an error (${answer.status}). Nothing may have changed; look at the actions below.`,
    };
  } catch {
    return { ok: false, error: "The server cannot be reached. Try again when the page is live." };
  }
}

class ReasonDialog {
  constructor(name, onDone) {
    this.dialog = byId(`${name}-dialog`);
    this.form = byId(`${name}-form`);
    this.reason = byId(`${name}-reason`);
    this.problem = byId(`${name}-problem`);
    this.confirm = byId(`${name}-confirm`);
    this.onDone = onDone;
    this.dialog.querySelector("[data-close]").addEventListener("click", () => this.dialog.close());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.reason.addEventListener("input", () => this.reason.removeAttribute("aria-invalid"));
  }

  open() {
    this.form.reset();
    this.reason.removeAttribute("aria-invalid");
    problem(this.problem, "");
    this.confirm.disabled = false;
    this.dialog.showModal();
  }

  async submit() {
    if (this.confirm.disabled) return;
    const missing = this.missing();
    problem(this.problem, missing ?? "");
    if (missing) return;
    this.confirm.disabled = true;
    const began = performance.now();
    const answer = await post(this.url(), this.form);
    this.confirm.disabled = false;
    if (!answer.ok) return problem(this.problem, answer.error);
    this.dialog.close();
    this.onDone(answer, began);
  }

  missing() {
    if (this.reason.value.trim()) return null;
    this.reason.setAttribute("aria-invalid", "true");
    this.reason.focus();
    return "Give a reason: it is kept in the audit trail.";
  }
}

export class SwitchDialog extends ReasonDialog {
  constructor(onDone) {
    super("switch", onDone);
    this.form.addEventListener("change", () => this.follow());
  }

  show(model, policy) {
    Object.assign(this, { model, policy });
    this.open();
    setText(this.form.querySelector('[data-slot="model"]'), model);
    const params = Object.entries(policy.params)
      .map(([key, value]) => `${key} ${value}`)
      .join(", ");
    setText(
      this.form.querySelector('[data-slot="current"]'),
      `${policy.name}${params ? ` (${params})` : ""}, revision ${policy.revision}`,
    );
    for (const radio of this.form.elements.policy) {
      radio.closest(".choice").classList.toggle("current", radio.value === policy.name);
      radio.checked = radio.value === policy.name;
    }
    for (const [key, value] of Object.entries(policy.params)) {
      const input = this.form.elements[`${policy.name}.${key}`];
      if (input) input.value = value;
    }
    this.follow();
    const radios = [...this.form.elements.policy];
    (radios.find((radio) => radio.checked) ?? radios[0]).focus();
  }

  follow() {
    const chosen = this.form.elements.policy.value;
    for (const choice of this.form.querySelectorAll(".choice")) {
      const mine = choice.querySelector("input[name=policy]").value === chosen;
      for (const parameter of choice.querySelectorAll(".parameter")) parameter.hidden = !mine;
    }
    setText(this.confirm, chosen ? `Switch to ${chosen}` : "Switch policy");
  }

  missing() {
    if (!this.form.elements.policy.value) return "Choose a policy.";
    const wrong = [...this.form.querySelectorAll(".parameter:not([hidden]) input")].find(
      (input) => !input.checkValidity() || input.value === "",
    );
    if (wrong) {
      wrong.focus();
      return `${wrong.name.split(".")[1]} must be a number from ${wrong.min} to ${wrong.max}.`;
    }
    if (this.isInForce()) return "This is the policy in force. Choose another, or change a parameter.";
    return super.missing();
  }

  isInForce() {
    if (this.form.elements.policy.value !== this.policy.name) return false;
    return Object.entries(this.policy.params).every(([key, value]) => {
      const input = this.form.elements[`${this.policy.name}.${key}`];
      return !input || input.value === String(value) || Number(input.value) === value;
    });
  }

  url() {
    return this.form.dataset.action.replace("MODEL", this.model.split("/").map(encodeURIComponent).join("/"));
  }
}

const EFFECTS = {
  pause: "It claims nothing more until it is resumed; what runs goes on to its end.",
  resume: "It claims requests again.",
  drain: "It claims nothing more, finishes what runs, and then waits to be stopped or resumed.",
};

export class ControlDialog extends ReasonDialog {
  constructor(onDone) {
    super("control", onDone);
  }

  show(replica, command) {
    Object.assign(this, { replica, command });
    this.open();
    const verb = `${command[0].toUpperCase()}${command.slice(1)}`;
    setText(byId("control-title"), `${verb} ${replica}`);
    setText(byId("control-effect"), EFFECTS[command]);
    setText(this.confirm, verb);
    this.reason.focus();
  }

  url() {
    return this.form.dataset.action
      .replace("REPLICA", encodeURIComponent(this.replica))
      .replace("COMMAND", this.command);
  }
}

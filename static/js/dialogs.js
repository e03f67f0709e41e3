// Whatever changes something: a native dialog asks for a reason, a POST carries it out.

import { byId, el, setText } from "./dom.js";

export const problem = (node, text) => {
  setText(node, text);
  node.hidden = !text;
};

/** Posts form data; gives {ok, ...answer}, and a sentence in `error` where it failed. */
export async function post(url, data) {
  try {
    const answer = await fetch(url, {
      method: "POST",
      body: data,
      headers: { Accept: "application/json" },
      redirect: "error",
    });
    const isJson = answer.headers.get("content-type")?.includes("json");
    if (isJson) return { ok: answer.ok, ...(await answer.json()) };
    if (answer.status === 403) return { ok: false, error: "This form is out of date. Load the page again and repeat." };
    return {
      ok: false,
      error: `The server answered with an error (${answer.status}). Nothing may have changed; look at the audit trail.`,
    };
  } catch {
    return { ok: false, error: "The server cannot be reached. Try again when the page is live." };
  }
}

export class ReasonDialog {
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
    const answer = await post(this.url(), this.data());
    this.confirm.disabled = false;
    if (!answer.ok) return this.refused(answer);
    this.dialog.close();
    this.onDone(answer, began);
  }

  data() {
    return new FormData(this.form);
  }

  refused(answer) {
    problem(this.problem, answer.error);
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

/**
 * A confirmation of anything: `ask({title, effect, effects, confirm, url, fields, onDone, onRefused})`. `effects` are lines of
 * what will change, `fields` what is posted beside the reason; `onRefused(answer)` may take an error elsewhere by returning true.
 */
export class ConfirmDialog extends ReasonDialog {
  constructor(name = "confirm") {
    super(name, (answer, began) => this.asked.onDone?.(answer, began));
    this.name = name;
  }

  ask(asked) {
    this.asked = asked;
    this.open();
    setText(byId(`${this.name}-title`), asked.title);
    setText(byId(`${this.name}-effect`), asked.effect ?? "");
    byId(`${this.name}-effects`).replaceChildren(...(asked.effects ?? []).map((text) => el("li", { text })));
    setText(this.confirm, asked.confirm);
    this.reason.focus();
  }

  data() {
    const data = super.data();
    for (const [name, value] of Object.entries(this.asked.fields ?? {})) data.set(name, value);
    return data;
  }

  refused(answer) {
    if (this.asked.onRefused?.(answer)) this.dialog.close();
    else super.refused(answer);
  }

  url() {
    return this.asked.url;
  }
}

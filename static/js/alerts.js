// The page of alerts: drawn anew every few seconds and when the feed tells of a change; acknowledging, changing a rule.

import { ReasonDialog } from "./dialogs.js";
import { byId, setText } from "./dom.js";
import { refresh } from "./refresh.js";
import { announce, startShell } from "./shell.js";

const PERIOD_MS = 5000;
const PARTS = ["open", "past", "rules", "channels"];

class AcknowledgeDialog extends ReasonDialog {
  constructor() {
    super("acknowledge", done);
  }

  show({ url, what }) {
    this.address = url;
    this.open();
    setText(byId("acknowledge-title"), `Acknowledge ${what}`);
    this.reason.focus();
  }

  missing() {
    return null;
  }

  url() {
    return this.address;
  }
}

class RuleDialog extends ReasonDialog {
  constructor() {
    super("rule", done);
  }

  show(rule) {
    this.address = rule.url;
    this.open();
    setText(byId("rule-title"), `Change ${rule.name}`);
    setText(byId("rule-effect"), `${rule.title}. ${rule.description}`);
    const fields = this.form.elements;
    for (const name of ["threshold", "window_s", "short_window_s", "hold_s", "clear_s", "severity"]) {
      fields[name].value = rule[name];
      this.mark(name, "");
    }
    // A rule may be about a model that is not offered any more.
    if (![...fields.model.options].some((option) => option.value === rule.model)) fields.model.add(new Option(rule.model));
    fields.model.value = rule.model;
    this.mark("model", "");
    fields.enabled.checked = Boolean(rule.enabled);
    fields.threshold.max = rule.maximum;
    setText(this.part("threshold").querySelector("label"), `Fires ${rule.side} (${rule.unit})`);
    this.bound("window_s", rule.windows);
    this.bound("short_window_s", rule.short_windows);
    fields.threshold.focus();
  }

  part(name) {
    return this.form.querySelector(`[data-field="${name}"]`);
  }

  /** Bounds of a window as "least most"; a kind without a window shows none. */
  bound(name, bounds) {
    const [least, most] = bounds ? bounds.split(" ") : ["0", "0"];
    this.part(name).hidden = !bounds;
    Object.assign(this.form.elements[name], { min: least, max: most });
  }

  missing() {
    const numbers = [...this.form.querySelectorAll('[data-field]:not([hidden]) input')];
    const wrong = numbers.filter((input) => {
      const bad = !input.checkValidity() || input.value === "";
      const most = input.max ? ` to ${Number(input.max).toLocaleString("en")}` : " or more";
      this.mark(input.name, bad ? `Give a number from ${Number(input.min).toLocaleString("en")}${most}.` : "");
      return bad;
    });
    wrong[0]?.focus();
    return wrong.length ? "One of the fields cannot be used." : super.missing();
  }

  mark(name, sentence) {
    const line = byId(`${name}-problem`);
    setText(line, sentence);
    line.hidden = !sentence;
    const field = this.form.elements[name];
    if (sentence) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
  }

  refused(answer) {
    for (const [name, sentence] of Object.entries(answer.fields ?? {})) if (this.form.elements[name]) this.mark(name, sentence);
    super.refused(answer);
  }

  url() {
    return this.address;
  }
}

const operator = byId("rule-dialog") !== null;
const acknowledging = operator && new AcknowledgeDialog();
const changing = operator && new RuleDialog();

document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-url]");
  if (!button) return;
  if (button.id.startsWith("rule-")) changing.show(button.dataset);
  else acknowledging.show(button.dataset);
});

function done(answer) {
  announce(answer.message);
  draw();
}

/** Draws the parts anew; who stood on a button stands on it again. */
async function draw() {
  drawn = Date.now();
  const focused = document.activeElement?.closest(PARTS.map((id) => `#${id}`).join()) ? document.activeElement.id : "";
  await refresh(...PARTS);
  if (focused && document.activeElement === document.body) byId(focused)?.focus({ preventScroll: true });
}

let drawn = Date.now();
let told = "";

startShell({
  onState: ({ state }) => {
    const now = JSON.stringify(state.alerts ?? {});
    const changed = told !== "" && now !== told;
    told = now;
    if (changed || (!document.hidden && Date.now() - drawn > PERIOD_MS)) draw();
  },
});

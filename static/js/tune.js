// The dialog that changes how a worker forms batches: its size, its mode, or the strategy that sets the size.

import { ReasonDialog } from "./dialogs.js";
import { byId, setText } from "./dom.js";

const TITLES = { set_batch_size: "Batch size of", set_mode: "Batch mode of", sizing: "Sizing of" };
const VERBS = { set_batch_size: "Change the batch size", set_mode: "Change the mode", sizing: "Change the sizing" };

export class TuneDialog extends ReasonDialog {
  constructor(onDone) {
    super("tune", onDone);
    byId("sizing").addEventListener("change", () => this.follow());
  }

  show(name, command, replica) {
    Object.assign(this, { name, command });
    this.open();
    for (const line of this.form.querySelectorAll(".field-problem")) line.hidden = true;
    for (const input of this.form.querySelectorAll('[aria-invalid="true"]')) input.removeAttribute("aria-invalid");
    for (const part of this.form.querySelectorAll(".tune-part")) part.hidden = part.dataset.command !== command;
    setText(byId("tune-title"), `${TITLES[command]} ${name}`);
    setText(this.confirm, VERBS[command]);
    this.form.elements.max_batch_size.value = replica.max_batch_size;
    for (const radio of this.form.elements.mode) {
      radio.checked = radio.value === replica.mode;
      radio.closest(".choice").classList.toggle("current", radio.checked);
    }
    byId("sizing").value = replica.sizing;
    for (const [key, value] of Object.entries(replica.sizing_params)) {
      const input = this.form.elements[`${replica.sizing}.${key}`];
      if (input) input.value = value;
    }
    this.follow();
    this.fields()[0]?.focus();
  }

  follow() {
    for (const part of this.form.querySelectorAll(".kind")) part.hidden = part.dataset.kind !== byId("sizing").value;
  }

  fields() {
    return [...this.form.querySelectorAll(".tune-part:not([hidden]) :is(input, select)")].filter(
      (field) => !field.closest(".kind[hidden]") && (field.type !== "radio" || field.checked),
    );
  }

  missing() {
    const wrong = this.fields().filter((field) => {
      const bad = !field.checkValidity() || field.value === "";
      this.mark(field, bad ? `${field.name.split(".").pop()} must be a number from ${field.min} to ${field.max}.` : "");
      return bad;
    });
    if (wrong.length) {
      wrong[0].focus();
      return "One of the fields cannot be used.";
    }
    return super.missing();
  }

  mark(field, sentence) {
    const line = byId(`${field.name}-problem`);
    if (!line) return;
    setText(line, sentence);
    line.hidden = !sentence;
    if (sentence) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
  }

  data() {
    const data = new FormData();
    for (const name of ["csrfmiddlewaretoken", "reason"]) data.set(name, this.form.elements[name].value);
    for (const field of this.fields()) data.set(field.name, field.value);
    return data;
  }

  refused(answer) {
    for (const field of this.fields()) if (answer.fields?.[field.name]) this.mark(field, answer.fields[field.name]);
    super.refused(answer);
  }

  url() {
    return this.form.dataset.action.replace("REPLICA", encodeURIComponent(this.name)).replace("COMMAND", this.command);
  }
}

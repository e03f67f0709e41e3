// The page of policies: the form of parameters, what it would change, and how a change is taken up.

import { ConfirmDialog, post, problem } from "./dialogs.js";
import { byId, setText } from "./dom.js";
import { refresh } from "./refresh.js";
import { announce, chosenModel, startShell } from "./shell.js";
import { Uptake } from "./uptake.js";

const form = byId("change-form");
const dialog = byId("confirm-dialog") && new ConfirmDialog();
const uptake = new Uptake(announce);
let policy = null;

const fields = () => [...form.querySelectorAll(".kind:not([hidden]) :is(input, select)")];
const guardFields = () => [...form.querySelectorAll(".guard :is(input, select):not(:disabled)")];
const shortName = (field) => field.name.split(".")[1];
const differs = (field) =>
  field.type === "number" ? Number(field.value) !== Number(field.dataset.value) : field.value !== field.dataset.value;

function showProblem(field, sentence) {
  const line = byId(`${field.name}-problem`);
  setText(line, sentence);
  line.hidden = !sentence;
  if (sentence) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

function check(field) {
  const wrong = field.type === "number" && (field.value === "" || !field.checkValidity());
  showProblem(field, wrong ? `${shortName(field)} must be a number from ${field.min} to ${field.max}.` : "");
  return !wrong;
}

/** What a submit would change, as lines. */
function listChanges() {
  const kind = form.elements.policy.value;
  const active = form.elements.policy.dataset.active;
  const lines = kind === active ? [] : [`policy ${active} → ${kind}`];
  for (const field of fields()) {
    if (kind === active && differs(field)) lines.push(`${shortName(field)} ${field.dataset.value} → ${field.value}`);
    if (kind !== active) lines.push(`${shortName(field)} ${field.value}`);
  }
  return lines;
}

function follow() {
  const kind = form.elements.policy.value;
  for (const part of form.querySelectorAll(".kind")) part.hidden = part.dataset.kind !== kind;
  if (!dialog) return;
  const lines = listChanges();
  byId("review").disabled = !lines.length;
  setText(byId("change-sum"), lines.length ? lines.join(", ") : "Nothing is changed yet.");
}

function review(event) {
  event.preventDefault();
  const wrong = [...fields(), ...guardFields()].filter((field) => !check(field));
  if (wrong.length) return wrong[0].focus();
  const kind = form.elements.policy.value;
  const values = Object.fromEntries([...fields(), ...guardFields()].map((field) => [field.name, field.value]));
  dialog.ask({
    title: `A new revision for ${chosenModel()}`,
    effect: "What waits is ordered anew; what runs goes on.",
    effects: [...listChanges(), ...describeGuard()],
    confirm: kind === form.elements.policy.dataset.active ? `Change ${kind}` : `Switch to ${kind}`,
    url: form.action,
    fields: { policy: kind, ...values },
    onDone: changed,
    onRefused: showRefusal,
  });
}

/** The guard as a line of what will happen. */
function describeGuard() {
  const metric = form.elements["guard.metric"];
  if (!metric?.value) return [];
  const { falls, unit } = metric.selectedOptions[0].dataset;
  const [threshold, watch] = ["guard.threshold", "guard.watch_s"].map((name) => form.elements[name].value);
  return [`guarded for ${watch} s: turned back if ${metric.selectedOptions[0].text} goes ${falls ? "below" : "above"} ${threshold} ${unit}`];
}

function followGuard() {
  const metric = form.elements["guard.metric"];
  const { threshold, unit, falls } = metric.selectedOptions[0].dataset;
  for (const name of ["guard.threshold", "guard.watch_s"]) form.elements[name].disabled = !metric.value;
  if (metric.value) form.elements["guard.threshold"].value = threshold;
  setText(byId("guard-side"), metric.value ? `Turn back ${falls ? "below" : "above"} (${unit})` : "Threshold");
}

function showRefusal(answer) {
  const wrong = [...fields(), ...guardFields()].filter((field) => answer.fields?.[field.name]);
  for (const field of wrong) showProblem(field, answer.fields[field.name]);
  wrong[0]?.focus();
  return wrong.length > 0;
}

function changed(answer, began) {
  uptake.begin(answer.model, answer, began);
  form.elements.policy.dataset.active = answer.name;
  for (const field of fields()) field.dataset.value = field.value;
  follow();
  redraw();
}

const redraw = () => refresh("in-force", "revisions").then(drawUptake);

function drawUptake() {
  if (policy) uptake.draw(chosenModel(), policy, workers());
}

let replicas = [];
function workers() {
  const live = replicas.filter((r) => r.model === chosenModel() && r.state !== "lost");
  return { live: live.length, behind: live.filter((r) => r.policy_revision < policy.revision).map((r) => r.name) };
}

form?.addEventListener("submit", review);
form?.addEventListener("change", follow);
form?.elements["guard.metric"]?.addEventListener("change", followGuard);
form?.addEventListener("input", (event) => {
  if (event.target.name?.includes(".")) check(event.target);
  follow();
});
if (form) follow();

// What if

const replay = byId("what-if-form");
let looked = 0;

replay?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = new FormData(replay);
  // Each candidate with the parameters that stand in the form of changes.
  for (const name of body.getAll("candidate")) {
    for (const field of form.querySelectorAll(`.kind[data-kind="${name}"] :is(input, select)`)) body.append(field.name, field.value);
  }
  const answer = await post(replay.action, body);
  problem(byId("what-if-problem"), answer.ok ? "" : answer.error);
  if (answer.ok) {
    announce(answer.message);
    refresh("what-if");
  }
});
if (replay) byId("replay").disabled = false; // until here the browser itself would send the form

/** While a replay runs, its progress is fetched each second. */
function followReplay() {
  if (byId("what-if")?.dataset.open !== "yes" || document.hidden || Date.now() - looked < 1000) return;
  looked = Date.now();
  refresh("what-if");
}

startShell({
  onState: ({ state }) => {
    followReplay();
    replicas = Object.entries(state.replicas).map(([name, replica]) => ({ name, ...replica }));
    const next = state.models[chosenModel()]?.policy;
    if (!next) return;
    // Somebody switched, here or elsewhere: what the server drew is old.
    const drawn = Number(document.querySelector("#in-force [data-revision]")?.dataset.revision);
    policy = next;
    if (next.revision !== drawn) redraw();
    else drawUptake();
  },
});

// One request's page: drawn anew each second until it has ended, and cancelled with a reason.

import { ConfirmDialog } from "./dialogs.js";
import { byId } from "./dom.js";
import { refresh } from "./refresh.js";
import { announce, startShell } from "./shell.js";

const PERIOD_MS = 1000;
const dialog = byId("confirm-dialog") && new ConfirmDialog();
let drawn = 0;

startShell({
  onState: () => {
    const open = byId("life")?.dataset.ended === "no";
    if (!open || document.hidden || Date.now() - drawn < PERIOD_MS || document.activeElement?.closest("#life")) return;
    drawn = Date.now();
    refresh("life");
  },
});

byId("main").addEventListener("click", (event) => {
  const button = event.target.closest("#cancel");
  if (!button) return;
  const id = byId("life").dataset.id;
  dialog.ask({
    title: "Cancel this request",
    effect: `${id} leaves the queue, or is stopped at the next step. Its client is told; what was not used is given back to its tenant.`,
    confirm: "Cancel the request",
    url: button.dataset.url,
    onDone: (answer) => {
      announce(answer.message);
      byId("main").focus();
      refresh("life");
    },
  });
});

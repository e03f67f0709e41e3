// The page of offline work: drawn anew every few seconds while somebody looks; a batch is cancelled with a reason.

import { ConfirmDialog } from "./dialogs.js";
import { byId } from "./dom.js";
import { refresh } from "./refresh.js";
import { announce, startShell } from "./shell.js";

const PERIOD_MS = 3000;
const dialog = byId("confirm-dialog") && new ConfirmDialog();
let drawn = Date.now();

startShell({
  onState: () => {
    if (document.hidden || Date.now() - drawn < PERIOD_MS || document.activeElement?.closest("#work")) return;
    drawn = Date.now();
    refresh("work");
  },
});

byId("main").addEventListener("click", (event) => {
  const button = event.target.closest("[data-cancel]");
  if (!button) return;
  dialog.ask({
    title: "Cancel this batch",
    effect: `${button.dataset.cancel} of ${button.dataset.tenant}: what is done stays, the rest is given back as errors.`,
    confirm: "Cancel the batch",
    url: button.dataset.url,
    onDone: (answer) => {
      announce(answer.message);
      byId("main").focus();
      refresh("work");
    },
  });
});

// The page of one's own API tokens: a new one is shown once; revoking asks for a reason.

import { ConfirmDialog, post, problem } from "./dialogs.js";
import { byId, setText } from "./dom.js";
import { refresh } from "./refresh.js";
import { announce, startShell } from "./shell.js";

const form = byId("token-form");
const dialog = new ConfirmDialog();

startShell();

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await post(form.action, new FormData(form));
  problem(byId("token-problem"), answer.ok ? "" : answer.error);
  byId("new-token").hidden = !answer.ok;
  if (!answer.ok) return form.elements.name.focus();
  setText(byId("new-token-name"), answer.name);
  setText(byId("new-token-text"), answer.token);
  form.reset();
  byId("new-token-text").focus();
  await refresh("tokens");
});
byId("make-token").disabled = false; // until here the browser itself would send the form, and show a bare answer

byId("copy-token").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(byId("new-token-text").textContent);
    announce("The token is copied.");
    setText(byId("copy-token"), "Copied");
  } catch {
    getSelection().selectAllChildren(byId("new-token-text")); // without a clipboard: select it, to be copied by hand
  }
});

byId("main").addEventListener("click", (event) => {
  const button = event.target.closest("[data-revoke]");
  if (!button) return;
  dialog.ask({
    title: "Revoke this token",
    effect: `${button.dataset.revoke}: calls with it are refused from now on, and it cannot be brought back.`,
    confirm: "Revoke the token",
    url: button.dataset.url,
    onDone: (answer) => {
      announce(answer.message);
      byId("main").focus();
      refresh("tokens");
    },
  });
});

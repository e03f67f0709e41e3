// The page of the audit trail: drawn anew when the feed tells of an action that it does not show yet.

import { refresh } from "./refresh.js";
import { startShell } from "./shell.js";

let newest = null;

startShell({
  onState: ({ state }) => {
    const latest = state.actions[0]?.id ?? "";
    if (newest !== null && latest !== newest && !document.activeElement?.closest("#trail")) refresh("trail");
    newest = latest;
  },
});

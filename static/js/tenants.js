// The page of tenants: drawn anew every few seconds while somebody looks.

import { refresh } from "./refresh.js";
import { startShell } from "./shell.js";

const PERIOD_MS = 5000;
let drawn = Date.now();

startShell({
  onState: () => {
    if (document.hidden || Date.now() - drawn < PERIOD_MS || document.activeElement?.closest("#tenants a")) return;
    drawn = Date.now();
    refresh("tenants");
  },
});

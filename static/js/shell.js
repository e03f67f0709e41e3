// The frame of every page: theme, the chosen model, the sign of the feed and the banner below it.

import { Connection } from "./connection.js";
import { byId, el, setAttribute, setText } from "./dom.js";
import { Feed } from "./feed.js";

const THEMES = ["auto", "light", "dark"];
const THEME_SIGNS = { auto: "◐", light: "☀", dark: "☾" };
const YEAR_S = 31_536_000;

const connection = new Connection();
let themeChanged = () => {};

/** Says something to who listens to the page. */
export const announce = (text) => setText(byId("announcer"), text);

/**
 * Starts the frame. `onState(snapshot)` is called with each state of the feed, at most once a frame; `onTheme()` when
 * colours change; `onModel()` when another model is chosen: without it the page is loaded for that model.
 */
export function startShell({ onState = () => {}, onTheme = () => {}, onModel = null } = {}) {
  themeChanged = onTheme;
  startTheme();
  startAccount();
  document.querySelector(".pages [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
  byId("model").addEventListener("change", (event) => chooseModel(event.target.value, onModel));
  let latest = null;
  const show = () => {
    const snapshot = latest;
    latest = null;
    connection.showFaults(snapshot.state.faults);
    document.body.classList.remove("loading");
    showFiring(snapshot.state.alerts);
    onState(snapshot);
  };
  new Feed(
    new URL("live/", location.origin.replace(/^http/, "ws")),
    "/session/",
    (snapshot) => {
      if (!latest) requestAnimationFrame(show);
      latest = snapshot;
    },
    (status, heard) => connection.showStatus(status, heard),
  ).start();
}

/** How many alerts fire, beside the page's name; who cannot see it hears of more. */
function showFiring(alerts) {
  if (alerts?.firing === undefined) return;
  const sign = byId("firing");
  setAttribute(sign, "data-unacknowledged", alerts.unacknowledged);
  const before = Number(sign.dataset.firing);
  if (before === alerts.firing) return;
  sign.dataset.firing = alerts.firing;
  sign.hidden = alerts.firing === 0;
  const words = [el("b", { text: String(alerts.firing) }), el("span", { class: "visually-hidden", text: " firing" })];
  sign.replaceChildren(...(sign.hidden ? [] : words));
  if (alerts.firing > before) announce(`${alerts.firing} ${alerts.firing === 1 ? "alert fires" : "alerts fire"}.`);
}

/** The model this page is about, "" where there is none. */
export const chosenModel = () => byId("model").dataset.chosen ?? "";

/** Makes the choice offer the models that the feed names. */
export function offerModels(names) {
  const select = byId("model");
  if ([...select.options].map((o) => o.value).join() !== names.join() || !names.length) {
    const none = [el("option", { value: "", text: "none" })];
    select.replaceChildren(...(names.length ? names.map((n) => el("option", { value: n, text: n })) : none));
  }
  if (!names.includes(select.dataset.chosen)) select.dataset.chosen = names[0] ?? "";
  if (select.value !== select.dataset.chosen) select.value = select.dataset.chosen;
  select.disabled = names.length < 2;
}

function chooseModel(name, onModel) {
  document.cookie = `penstock_model=${encodeURIComponent(name)}; path=/; max-age=${YEAR_S}; samesite=lax`;
  const url = new URL(location.href);
  url.searchParams.set("model", name);
  if (!onModel) return location.assign(url);
  byId("model").dataset.chosen = name;
  history.replaceState(null, "", url);
  onModel();
}

/** The menu behind one's name closes as menus do. */
function startAccount() {
  const menu = byId("account");
  document.addEventListener("click", (event) => menu.contains(event.target) || (menu.open = false));
  menu.addEventListener("focusout", (event) => {
    if (event.relatedTarget && !menu.contains(event.relatedTarget)) menu.open = false;
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    menu.querySelector("summary").focus();
  });
}

function startTheme() {
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme ?? "auto";
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    localStorage.setItem("penstock-theme", next);
    showTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  showTheme();
}

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const button = byId("theme");
  setText(button.firstElementChild, THEME_SIGNS[theme]);
  const name = `${theme[0].toUpperCase()}${theme.slice(1)}`;
  setText(button.lastElementChild, name);
  button.setAttribute("aria-label", theme === "auto" ? "Theme: Auto, as the system has it" : `Theme: ${name}`);
  themeChanged();
}

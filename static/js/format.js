// Numbers as people read them; every one carries its unit.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const two = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const NONE = "–";

export const count = (n) => (n === undefined || n === null ? NONE : n < 100_000 ? whole.format(n) : compact.format(n));

export const rate = (n) => {
  if (n === undefined || n === null) return NONE;
  return n < 1 ? two.format(n) : n < 100 ? one.format(n) : count(Math.round(n));
};

export const percent = (share) => (share === undefined || share === null ? NONE : `${whole.format(share * 100)} %`);

export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** Seconds as the two largest units that matter. */
export function duration(s) {
  if (s === undefined || s === null) return NONE;
  if (s < 0.0995) return `${s < 0.00995 ? (s * 1000).toFixed(1) : Math.round(s * 1000)} ms`;
  if (s < 0.9995) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86_400)} d ${Math.floor((s % 86_400) / 3600)} h`;
}

export const bytes = (n) => {
  if (n === undefined || n === null) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) [n, i] = [n / 1024, i + 1];
  return `${n < 10 ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
};

/** How long ago, from the server's clock: "just now", "40 s ago". */
export function ago(then, now) {
  const s = Math.floor(now - then);
  if (s < 3) return "just now";
  if (s < 60) return `${s} s ago`;
  return `${s < 3600 ? `${Math.floor(s / 60)} min` : duration(s)} ago`;
}

/** A duration in one unit, for narrow places. */
export function brief(s) {
  if (s === undefined || s === null || s < 10) return duration(s);
  if (s < 120) return `${Math.round(s)} s`;
  return s < 7200 ? `${one.format(s / 60)} min` : `${one.format(s / 3600)} h`;
}

export const clock = (ms) =>
  new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

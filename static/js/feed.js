// The socket: state first, then updates; asks again after a gap, and comes back by itself after a loss.

import { apply } from "./state.js";

const FIRST_PAUSE_MS = 300;
const LONGEST_PAUSE_MS = 5000;
const SILENCE_MS = 3000;
const SIGNED_OUT = 4401;
const FORBIDDEN = 4403;

/**
 * Calls `onState(snapshot)` after each message, and `onStatus(status, since)` when the feed's status changes:
 * "live", "connecting", "stale", "signed-out" or "forbidden"; `since` is the time of the last message in ms, or null.
 */
export class Feed {
  constructor(url, sessionUrl, onState, onStatus) {
    Object.assign(this, { url, sessionUrl, onState, onStatus });
    this.snapshot = null;
    this.heard = null;
    this.pause = FIRST_PAUSE_MS;
    this.asked = false;
    this.status = "connecting";
  }

  start() {
    this.connect();
    this.watch = setInterval(() => this.checkSilence(), 500);
    // A laptop that wakes up, or a network that is back, need not wait for the next try.
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.hurry());
  }

  connect() {
    clearTimeout(this.timer);
    this.timer = null;
    const socket = new WebSocket(this.url);
    this.socket = socket;
    this.opened = Date.now();
    socket.onmessage = (event) => socket === this.socket && this.take(JSON.parse(event.data));
    socket.onclose = (event) => socket === this.socket && this.closed(event.code);
  }

  take(message) {
    this.heard = Date.now();
    this.pause = FIRST_PAUSE_MS;
    const next = message.type === "snapshot" ? message : apply(this.snapshot, message);
    if (next === null) {
      if (!this.asked) this.socket.send("snapshot");
      this.asked = true;
      return;
    }
    this.asked = false;
    this.snapshot = next;
    this.set("live");
    this.onState(next);
  }

  async closed(code) {
    this.socket = null;
    if (code === SIGNED_OUT) return this.end("signed-out");
    if (code === FORBIDDEN) return this.end("forbidden");
    this.set(this.snapshot ? "stale" : "connecting");
    if (await this.refused()) return;
    // Spread out, so that the pages of a restarted server do not all come back in the same moment.
    this.timer = setTimeout(() => this.connect(), this.pause * (0.75 + Math.random() / 2));
    this.pause = Math.min(LONGEST_PAUSE_MS, this.pause * 1.7);
  }

  /** A refused handshake looks like a lost server; the session's page tells them apart. */
  async refused() {
    try {
      const answer = await fetch(this.sessionUrl, { headers: { Accept: "application/json" }, cache: "no-store" });
      if (!answer.ok) return false;
      const session = await answer.json();
      if (session.signed_in && session.may_view) return false;
      this.end(session.signed_in ? "forbidden" : "signed-out");
      return true;
    } catch {
      return false;
    }
  }

  checkSilence() {
    if (this.ended || !this.socket) return;
    const last = Math.max(this.heard ?? 0, this.opened);
    if (Date.now() - last < SILENCE_MS) return;
    this.set(this.snapshot ? "stale" : "connecting");
    // A half-open connection never closes by itself.
    if (Date.now() - last > 3 * SILENCE_MS) this.drop();
  }

  drop() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.closed(1006);
  }

  hurry() {
    if (this.timer && !this.ended) this.connect();
  }

  end(status) {
    this.ended = true;
    clearInterval(this.watch);
    this.set(status);
  }

  set(status) {
    if (status === this.status && status !== "stale") return;
    this.status = status;
    this.onStatus(status, this.heard);
  }
}

// Parts of a page that the server drew, drawn anew without losing the rest: forms half filled in, focus, scroll.

let running = null;
const wanted = new Set();
let pressed = false;
// Only the first button clicks; of another, which opens a menu, the end may never be told.
addEventListener("pointerdown", (event) => (pressed = event.button === 0), true);
for (const end of ["pointerup", "pointercancel", "blur"]) addEventListener(end, () => (pressed = false), true);

/** A press becomes a click only where its element is still there when it ends. */
async function pressEnds() {
  while (pressed) await new Promise((done) => setTimeout(done, 30));
}

/** Fetches this page and replaces the elements of these ids. Calls in the meantime end in one more fetch. */
export async function refresh(...ids) {
  for (const id of ids) wanted.add(id);
  running ??= load().finally(() => {
    running = null;
    if (wanted.size) refresh();
  });
  return running;
}

async function load() {
  const ids = [...wanted];
  wanted.clear();
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store", redirect: "error" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    await pressEnds();
    for (const id of ids) {
      const [old, fresh] = [document.getElementById(id), page.getElementById(id)];
      if (old && fresh && !old.isEqualNode(fresh)) old.replaceWith(document.adoptNode(fresh));
    }
  } catch {
    // The page stays as it is; the banner says when the server is away.
  }
}

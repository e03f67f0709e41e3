// Parts of a page that the server drew, drawn anew without losing the rest: forms half filled in, focus, scroll.

let running = null;
let again = false;

/** Fetches this page and replaces the elements of these ids. Calls in the meantime end in one more fetch. */
export async function refresh(...ids) {
  if (running) {
    again = true;
    return running;
  }
  running = load(ids).finally(() => {
    running = null;
    if (again) {
      again = false;
      refresh(...ids);
    }
  });
  return running;
}

async function load(ids) {
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store", redirect: "error" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const id of ids) {
      const [old, fresh] = [document.getElementById(id), page.getElementById(id)];
      if (old && fresh && !old.isEqualNode(fresh)) old.replaceWith(document.adoptNode(fresh));
    }
  } catch {
    // The page stays as it is; the banner says when the server is away.
  }
}

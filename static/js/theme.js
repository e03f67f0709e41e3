// Sets the theme before anything is drawn: "light" and "dark" are kept in this browser, else the system decides.
(() => {
  try {
    const kept = localStorage.getItem("penstock-theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // Storage may be closed to this page; then the system's theme holds.
  }
})();

// Runs before anything is drawn: sets the theme, and tells the server the reader's time zone for its next page.
(() => {
  try {
    const kept = localStorage.getItem("penstock-theme");
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
  } catch {
    // Storage may be closed to this page; then the system's theme holds.
  }
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone) document.cookie = `penstock_zone=${encodeURIComponent(zone)}; path=/; max-age=31536000; samesite=lax`;
})();

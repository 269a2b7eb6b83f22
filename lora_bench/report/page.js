"use strict";

// Light or dark, links into folded sections, and what is kept while the page is refreshed.
{
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const folds = [...document.querySelectorAll("details[id]")];
  const key = `lora-bench ${location.pathname}`;

  const setTheme = (name) => { theme.value = name; root.dataset.theme = name; };
  theme.addEventListener("change", () => setTheme(theme.value));

  const openTarget = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", openTarget);

  const save = () => {
    const open = folds.filter((fold) => fold.open).map((fold) => fold.id);
    const kept = { theme: theme.value, open, scroll: scrollY, settings: settings.state && settings.state() };
    try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch { /* no storage: nothing is kept */ }
  };
  const restore = () => {
    let kept = null;
    try { kept = JSON.parse(sessionStorage.getItem(key)); } catch { /* no storage */ }
    if (!kept) return null;
    setTheme(kept.theme);
    for (const fold of folds) fold.open = kept.open.includes(fold.id);
    if (kept.settings && settings.restore) settings.restore(kept.settings);
    return kept;
  };
  addEventListener("pagehide", save);

  const kept = restore();
  openTarget();
  charts.drawVisible();
  if (kept) {
    if (settings.compare) settings.compare();
    scrollTo({ top: kept.scroll, behavior: "instant" });
  }

  // While runs finish the page loads itself again, unless the reader is typing or choosing.
  if (root.dataset.refresh) {
    setInterval(() => {
      if (!document.activeElement.matches("input[type=search], select")) location.reload();
    }, 1000 * Number(root.dataset.refresh));
  }
}

// Before the page is drawn: that scripts run, until they have turned out not to, and the theme that was chosen last.
document.documentElement.classList.add("scripted");
addEventListener("DOMContentLoaded", () => document.documentElement.classList.toggle("scripted", window.started === true));
try {
  const kept = localStorage.getItem("varm-merge theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch { /* a browser that keeps nothing for files */ }

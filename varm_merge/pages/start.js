// Before the page is drawn: that scripts run, or one has failed, and the theme that was chosen last.
document.documentElement.classList.add("scripted");
addEventListener("error", () => document.documentElement.classList.remove("scripted"));
try {
  const kept = localStorage.getItem("varm-merge theme");
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
} catch { /* a browser that keeps nothing for files */ }

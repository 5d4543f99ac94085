// The chosen colours, before anything is painted. A classic script: modules run too late for that.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("tenfold-settings") ?? "{}").theme ?? "";
} catch {
  document.documentElement.dataset.theme = ""; // damaged or forbidden: the system's colours
}

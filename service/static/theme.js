// Before anything is painted: the theme that was chosen, else the system's.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* storage may be forbidden */ }
  const paint = () => { document.documentElement.dataset.theme = chosen ?? (dark.matches ? "dark" : "light"); };
  paint();
  dark.addEventListener("change", paint);
  window.chooseTheme = (name) => {
    chosen = name;
    try { localStorage.setItem("theme", name); } catch { /* only for this page, then */ }
    paint();
    document.dispatchEvent(new Event("themechange"));
  };
})();

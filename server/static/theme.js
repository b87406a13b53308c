// Runs before the page is drawn: the colours that were chosen, if any were. A plain script, because modules run later.
"use strict";
{
  let theme = null;
  try {
    theme = localStorage.getItem("torchchat.theme");
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // storage is blocked: the system's colours
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}

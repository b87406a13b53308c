// Light or dark: as the system has it until a person says otherwise. theme.js does the same before the page is drawn.

import { announce } from "./dom.js";
import { lasting } from "./small.js";

const NEXT = { auto: "light", light: "dark", dark: "auto" };
const NAMES = { auto: "as the system has them", light: "light", dark: "dark" };

export function switchTheme() {
  const root = document.documentElement;
  const theme = NEXT[root.dataset.theme ?? "auto"];
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  lasting.set("torchchat.theme", theme);
  announce(`Colours: ${NAMES[theme]}`);
}

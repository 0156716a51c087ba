// Dark or light: as the system has it, until somebody chooses. Runs before the first paint.

import { local } from "./kept.js";

const KEY = "loopwright.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");

/** @returns {"dark" | "light"} what is shown now */
export function theme() {
  const chosen = document.documentElement.dataset.theme;
  if (chosen === "dark" || chosen === "light") return chosen;
  return dark.matches ? "dark" : "light";
}

/** Show the other one; the choice is kept unless it is what the system has anyway. */
export function switchTheme() {
  const wanted = theme() === "dark" ? "light" : "dark";
  const asSystem = (wanted === "dark") === dark.matches;
  if (asSystem) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = wanted;
  if (asSystem) local.remove(KEY);
  else local.write(KEY, wanted);
}

const kept = local.read(KEY);
if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;

// Keys that work everywhere on the page, and the list of them.

import { byId } from "./dom.js";
import { local } from "./kept.js";

const OFF = "loopwright.single-keys-off";

/**
 * @param {Record<string, () => void>} deeds what a single key does, while nothing is being typed
 * @param {() => void} escape
 */
export function listen(deeds, escape) {
  const box = /** @type {HTMLInputElement} */ (byId("single-keys"));
  box.checked = local.read(OFF) === null;
  box.addEventListener("change", () => {
    if (box.checked) local.remove(OFF);
    else local.write(OFF, "yes");
  });
  byId("open-keys").addEventListener("click", showKeys);
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && !modal()) escape();
    const deed = event.key === "?" ? showKeys : deeds[event.key];
    if (!deed || !box.checked || modal() || typing(event.target)) return;
    event.preventDefault();
    deed();
  });
}

function showKeys() {
  /** @type {HTMLDialogElement} */ (byId("keys")).showModal();
}

/** Whether something lies over the page that takes keys for itself. */
function modal() {
  return document.querySelector("dialog:modal") !== null;
}

/** @param {EventTarget | null} target */
function typing(target) {
  return target instanceof HTMLElement && target.matches("input, textarea, select");
}

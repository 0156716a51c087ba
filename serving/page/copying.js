// Copying to the clipboard, also where the page came over plain HTTP and the browser has no clipboard for it.

import { say } from "./announce.js";
import { make } from "./dom.js";
import { notice } from "./notice.js";

/** @param {string} text */
export async function copy(text) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyBySelecting(text);
    say("Copied");
  } catch {
    notice("The browser did not let this page copy; select the text and copy it by hand.");
  }
}

/** @param {string} text */
function copyBySelecting(text) {
  const focused = document.activeElement;
  const area = make("textarea", { class: "unseen", readonly: true, "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (focused instanceof HTMLElement) focused.focus();
  if (!copied) throw new Error("the browser refused");
}

// Asks for the key of an endpoint that wants one.

import { byId } from "./dom.js";
import { apiKey, setApiKey } from "./endpoint.js";

/** @type {Promise<boolean> | null} while it is open */
let asking = null;

/** @returns {Promise<boolean>} whether a key was given */
export function askForKey() {
  asking ??= opened().finally(() => (asking = null));
  return asking;
}

/** @returns {Promise<boolean>} */
function opened() {
  const dialog = /** @type {HTMLDialogElement} */ (byId("key"));
  const form = /** @type {HTMLFormElement} */ (byId("key-form"));
  form.reset();
  byId("key-unknown").textContent = apiKey() ? "The endpoint does not know the key that was given." : "";
  const ended = new AbortController();
  const { signal } = ended;
  byId("cancel-key").addEventListener("click", () => dialog.close(), { signal });
  return new Promise((resolve) => {
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        setApiKey(String(new FormData(form).get("key")).trim());
        resolve(true);
        dialog.close();
      },
      { signal },
    );
    dialog.addEventListener(
      "close",
      () => {
        ended.abort();
        resolve(false);
      },
      { signal },
    );
    dialog.showModal();
  });
}

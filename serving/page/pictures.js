// Pictures and clips as they are shown, and as text that can be sent and stored.

import { make } from "./dom.js";

/**
 * A picture or clip that goes with a question; `url` is a data URL.
 * @typedef {{kind: "image" | "video", url: string, name: string}} Attachment
 */

/**
 * @param {Blob} blob
 * @returns {Promise<string>} its data URL
 */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(/** @type {string} */ (reader.result)));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(blob);
  });
}

/**
 * The picture, or the clip with the browser's controls; an animation is a picture to a browser.
 *
 * @param {Attachment} attachment
 */
export function shown({ url, name }) {
  if (!url.startsWith("data:video/")) return make("img", { class: "picture", src: url, alt: name });
  const clip = make("video", { class: "picture", src: url, controls: true, loop: true, "aria-label": name });
  clip.muted = true;
  clip.playsInline = true;
  return clip;
}

// The one line above the question box that says what is wrong, and what can be done about it.

import { Refused } from "./endpoint.js";
import { byId, make } from "./dom.js";

const MAYBE = "It may be answered now.";
/** @type {ReturnType<typeof setInterval> | undefined} */
let counting;

export function clearNotice() {
  clearInterval(counting);
  byId("notice").replaceChildren();
}

/**
 * @param {string} text
 * @param {{label: string, act: () => void}} [offer] a button behind the text
 */
export function notice(text, offer) {
  clearInterval(counting);
  const act = () => {
    clearNotice();
    offer?.act();
  };
  const close = make("button", { type: "button", class: "plain", click: clearNotice }, "Dismiss");
  const button = offer && make("button", { type: "button", class: "plain strong", click: act }, offer.label);
  byId("notice").replaceChildren(make("p", {}, make("span", {}, text), button, close));
}

/**
 * Say what failed, in one line.
 *
 * @param {unknown} error
 * @param {() => void} [again] tries once more what failed
 */
export function failed(error, again) {
  const offer = again && { label: "Try again", act: again };
  if (!(error instanceof Refused)) {
    notice("Something in this page broke; the browser's console says what.", offer);
    throw error;
  }
  if (error.status === 429 && error.retrySeconds !== null) countDown(error, error.retrySeconds, offer);
  else notice(error.message, offer);
}

/**
 * Count down for the eye; the ear is told once.
 *
 * @param {Refused} error
 * @param {number} seconds
 * @param {{label: string, act: () => void}} [offer]
 */
function countDown(error, seconds, offer) {
  const busy = error.code === "queue_full";
  const why = busy ? "Too many questions are being answered right now." : "Too many requests were made with this key.";
  const text = (/** @type {number} */ left) => (left > 0 ? `${why} Try again in ${left} s.` : MAYBE);
  notice(text(Math.ceil(seconds)), offer);
  const line = byId("notice").querySelector("span");
  const seen = make("span", { "aria-hidden": "true" }, line?.textContent ?? "");
  line?.classList.add("unseen");
  line?.before(seen);
  const until = performance.now() + seconds * 1000;
  counting = setInterval(() => {
    const left = Math.ceil((until - performance.now()) / 1000);
    seen.textContent = text(left);
    if (left <= 0) clearInterval(counting);
  }, 1000);
}

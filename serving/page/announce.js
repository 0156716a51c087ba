// What a screen reader is told while an answer is written: whole sentences with pauses between, not each token.

import { byId } from "./dom.js";

const PAUSE_MILLISECONDS = 2500;
const SENTENCE_END = /[.!?:;]\s|\n/g;

/** @param {string} text said as soon as the listener has time */
export function say(text) {
  byId("said").textContent = text;
}

/** Says an answer that grows. */
export class Reader {
  #said = 0;
  #last = 0;

  /** @param {string} text the answer so far */
  grown(text) {
    if (performance.now() - this.#last < PAUSE_MILLISECONDS) return;
    const ends = [...text.slice(this.#said).matchAll(SENTENCE_END)];
    const end = ends.at(-1);
    if (end) this.#say(text, this.#said + end.index + end[0].length);
  }

  /**
   * @param {string} text the whole answer
   * @param {string} ending said after it
   */
  ended(text, ending) {
    say(`${text.slice(this.#said)} ${ending}`.trim());
  }

  /**
   * @param {string} text
   * @param {number} end
   */
  #say(text, end) {
    say(text.slice(this.#said, end));
    this.#said = end;
    this.#last = performance.now();
  }
}

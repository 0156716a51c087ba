// Where the questions and answers stand, and how the page scrolls with an answer that grows.

import { byId, make } from "./dom.js";
import { shown } from "./pictures.js";

const NEAR_PIXELS = 60;

/** The list of turns, one element each. */
export class Transcript {
  #list = byId("turns");
  #scroll = byId("scroll");
  #following = true;
  /** Whether an answer is being written, which the page then follows. */
  writing = false;

  constructor() {
    this.#scroll.addEventListener("scroll", () => this.#look(), { passive: true });
    byId("latest").addEventListener("click", () => this.toEnd());
    new ResizeObserver(() => this.#keep(this.writing)).observe(this.#list);
    new ResizeObserver(() => this.#keep(true)).observe(this.#scroll);
  }

  clear() {
    this.#list.replaceChildren();
    byId("welcome").hidden = false;
  }

  /**
   * @param {string} question
   * @param {import("./pictures.js").Attachment[]} attachments
   * @returns {HTMLElement} the place for the answer
   */
  add(question, attachments) {
    byId("welcome").hidden = true;
    const place = make("div", { class: "place" });
    const pictures = attachments.length > 0 && make("div", { class: "pictures" }, ...attachments.map(shown));
    const asked = make("div", { class: "question" }, make("span", { class: "unseen" }, "You asked: "), pictures, question);
    this.#list.append(make("li", { class: "turn" }, asked, place));
    return place;
  }

  toEnd() {
    this.#scroll.scrollTop = this.#scroll.scrollHeight;
    this.#following = true;
    byId("latest").hidden = true;
  }

  /** @param {boolean} still whether whoever was at the end is to stay there */
  #keep(still) {
    if (still && this.#following) this.toEnd();
    else this.#look();
  }

  #look() {
    const left = this.#scroll.scrollHeight - this.#scroll.scrollTop - this.#scroll.clientHeight;
    this.#following = left < NEAR_PIXELS;
    byId("latest").hidden = this.#following;
  }
}

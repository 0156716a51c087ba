// The box in which questions are written.

import { Attachments } from "./attachments.js";
import { byId } from "./dom.js";

const MAX_LINES_PIXELS = 220;

/** Sends what is written, and turns its button into *stop* while an answer is being written. */
export class Composer {
  #area = /** @type {HTMLTextAreaElement} */ (byId("question"));
  #busy = false;
  #attachments = new Attachments();

  /**
   * @param {(question: string, attachments: import("./pictures.js").Attachment[]) => void} send
   * @param {() => void} stop
   */
  constructor(send, stop) {
    const form = /** @type {HTMLFormElement} */ (byId("composer"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const question = this.#area.value.trim();
      if (this.#busy || this.#attachments.reading || !(question || this.#attachments.count)) return;
      this.#area.value = "";
      this.#fit();
      send(question, this.#attachments.take());
    });
    this.#area.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    this.#area.addEventListener("input", () => this.#fit());
    byId("stop").addEventListener("click", stop);
  }

  /** @param {boolean} sees whether the model that answers does, and pictures can be added */
  set sees(sees) {
    this.#attachments.offered = sees;
  }

  focus() {
    this.#area.focus();
  }

  /** @param {boolean} busy whether an answer is being written */
  set busy(busy) {
    const held = byId(busy ? "send" : "stop") === document.activeElement;
    this.#busy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (held) byId(busy ? "stop" : "question").focus();
  }

  #fit() {
    this.#area.style.height = "auto";
    this.#area.style.height = `${Math.min(this.#area.scrollHeight, MAX_LINES_PIXELS)}px`;
  }
}

// One answer as it is seen: its words, its steps folded under them, which model said it, and what can be done with it.

import { Reader, say } from "./announce.js";
import { copy } from "./copying.js";
import { icon, iconButton, make } from "./dom.js";
import { FeedbackView } from "./feedback.js";
import { openLineage } from "./lineage.js";
import * as markdown from "./markdown.js";
import { StepsView, written } from "./steps.js";

/** @typedef {import("./conversations.js").Answer} Answer */

/** @type {Record<string, string>} */
const ENDINGS = {
  length: "Cut off: the answer reached the limit of tokens.",
  tool_calls: "A tool that changes something waits for you.",
  stopped: "You stopped this answer.",
  broken: "This answer broke off.",
};

/**
 * What the page does for an answer.
 * @typedef {{changed: () => void, refused: (error: import("./endpoint.js").Refused) => void, again: () => void,
 *   confirm: () => void, turnTo: (index: number) => void}} Deeds
 */

/** An answer, grown chunk by chunk or there from the start. */
export class AnswerView {
  #words = make("div", { class: "words" });
  #steps = new StepsView();
  #state = make("p", { class: "state" });
  #under = make("div");
  #reader = new Reader();
  #frame = 0;
  element = make(
    "article",
    { class: "answer", "aria-label": "Answer" },
    this.#words,
    this.#state,
    this.#steps.element,
    this.#under,
  );

  /** @param {Answer} answer which this view shows, and which may still grow */
  constructor(answer) {
    this.answer = answer;
    this.#steps.add(answer.steps);
    this.#render();
  }

  /** Say that the first word is still to come. */
  wait() {
    this.element.setAttribute("aria-busy", "true");
    this.waitFor("Thinking");
    say("Answering");
  }

  /** @param {string} line what is waited for */
  waitFor(line) {
    this.#state.replaceChildren(make("span", { class: "waiting" }), line);
  }

  /** @param {import("./stream.js").Chunk} chunk */
  grow(chunk) {
    this.#steps.add(chunk.steps);
    const called = chunk.steps.findLast((step) => step.type === "call");
    if (called) this.waitFor(`Asked ${called.name}`);
    else if (!this.answer.content) this.waitFor("Thinking");
    if (!chunk.text) return;
    this.#state.replaceChildren();
    this.element.classList.add("writing");
    this.#reader.grown(this.answer.content);
    // At most once a frame, however fast the words come.
    this.#frame ||= requestAnimationFrame(() => this.#render());
  }

  /**
   * The answer is over, well or not; show what can be done with it.
   *
   * @param {number} index among the answers to its question
   * @param {number} count of them
   * @param {Deeds} deeds
   */
  finish(index, count, deeds) {
    cancelAnimationFrame(this.#frame);
    this.#render();
    const busy = this.element.getAttribute("aria-busy") === "true";
    this.element.removeAttribute("aria-busy");
    this.element.classList.remove("writing");
    const ending = ENDINGS[this.answer.ended] ?? "";
    const silent = !this.answer.content && this.answer.ended !== "tool_calls";
    const said = [silent && "The model said nothing.", ending].filter((line) => line).join(" ");
    this.#state.replaceChildren(said);
    if (busy) this.#reader.ended(this.answer.content, said);
    this.#under.replaceChildren(...this.#actions(index, count, deeds));
  }

  /**
   * @param {number} index
   * @param {number} count
   * @param {Deeds} deeds
   * @returns {HTMLElement[]}
   */
  #actions(index, count, deeds) {
    const { id, model, content } = this.answer;
    const feedback = new FeedbackView(this.answer, deeds.changed, deeds.refused);
    const turning =
      count > 1 &&
      make(
        "span",
        { class: "turning", role: "group", "aria-label": "Other answers" },
        iconButton("Earlier answer", "left", () => deeds.turnTo(index - 1), { disabled: index === 0 }),
        make("span", { "aria-label": `Answer ${index + 1} of ${count}` }, `${index + 1}/${count}`),
        iconButton("Later answer", "right", () => deeds.turnTo(index + 1), { disabled: index === count - 1 }),
      );
    const about = make(
      "button",
      { type: "button", class: "model", title: "Everything behind this answer", click: () => openLineage(id) },
      icon("lineage"),
      make("span", { class: "unseen" }, "Lineage: answered by "),
      model,
    );
    const calls = this.answer.ended === "tool_calls" ? (this.answer.calls ?? []) : [];
    const confirming = make(
      "div",
      { class: "again", hidden: !calls.length },
      ...calls.map(({ function: { name, arguments: text } }) =>
        make("p", {}, make("code", {}, written({ type: "call", name, arguments: JSON.parse(text) }))),
      ),
      make("button", { type: "button", class: "plain", click: deeds.confirm }, calls.length > 1 ? "Run them" : "Run it"),
    );
    const row = make(
      "div",
      { class: "actions" },
      turning,
      ...feedback.buttons,
      content !== "" && iconButton("Copy answer", "copy", () => copy(content)),
      iconButton("Answer again", "again", deeds.again, { class: "quiet again" }),
      about,
    );
    return [confirming, row, feedback.element];
  }

  #render() {
    this.#frame = 0;
    markdown.show(this.#words, this.answer.content, copy);
  }
}

// What somebody thinks of an answer: a thumb, what it should have said, a comment. Shown as voted once it is stored.

import { say } from "./announce.js";
import { icon, iconButton, make } from "./dom.js";
import { Refused, sendVote } from "./endpoint.js";

/** @typedef {import("./conversations.js").Answer} Answer */
/** @typedef {import("./conversations.js").Vote} Vote */
/** @typedef {{rating: "up" | "down", correction?: string, comment?: string}} Opinion */

let forms = 0;

/** Thumbs, the form behind them, and a line that says what was voted. */
export class FeedbackView {
  #up = iconButton("Good answer", "up", () => this.#thumb("up"), { "aria-pressed": "false" });
  #down = iconButton("Bad answer", "down", () => this.#thumb("down"), { "aria-pressed": "false" });
  #correct = iconButton("Correct this answer", "pen", () => this.#open("down"));
  /** The buttons, for the row of actions. */
  buttons = [this.#up, this.#down, this.#correct];
  /** What stands beneath that row. */
  element = make("div", { class: "feedback" });
  /** @type {Opinion["rating"]} */
  #rating = "down";

  /**
   * @param {Answer} answer
   * @param {() => void} changed is called when a vote was stored
   * @param {(error: Refused) => void} refused
   */
  constructor(answer, changed, refused) {
    this.answer = answer;
    this.changed = changed;
    this.refused = refused;
    this.#show();
  }

  /** @param {Opinion["rating"]} rating */
  async #thumb(rating) {
    const vote = this.answer.vote;
    if (vote?.rating !== rating && !(await this.#send({ rating, comment: vote?.comment }))) return;
    this.#open(rating);
  }

  /**
   * @param {Opinion} opinion
   * @returns {Promise<boolean>} whether it is stored
   */
  async #send(opinion) {
    for (const button of this.buttons) button.disabled = true;
    try {
      const id = await sendVote({ completion_id: this.answer.id, ...opinion });
      this.answer.vote = { id, ...opinion };
      this.changed();
      say(opinion.correction ? "Correction stored" : "Vote stored");
      this.#show();
      return true;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.refused(error);
      return false;
    } finally {
      for (const button of this.buttons) button.disabled = false;
    }
  }

  #show() {
    const vote = this.answer.vote;
    this.#up.setAttribute("aria-pressed", String(vote?.rating === "up"));
    this.#down.setAttribute("aria-pressed", String(vote?.rating === "down"));
    this.element.replaceChildren(...(vote ? [summary(vote, () => this.#open(vote.rating))] : []));
  }

  /**
   * Open the form: what it should have said (for what is not good), and a comment.
   *
   * @param {Opinion["rating"]} rating
   */
  #open(rating) {
    this.#rating = rating;
    const vote = this.answer.vote;
    const form = make("form", { class: "opinion", submit: (/** @type {Event} */ event) => this.#submit(event) });
    if (rating === "down")
      form.append(...field("correction", "What it should have said", vote?.correction ?? this.answer.content.trim()));
    form.append(...field("comment", "Comment (optional)", vote?.comment ?? ""));
    const cancel = make("button", { type: "button", class: "plain", click: () => this.#close() }, "Cancel");
    form.append(make("div", { class: "row" }, make("button", { type: "submit", class: "filled" }, "Send"), cancel));
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        this.#close();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        form.requestSubmit();
      }
    });
    this.element.replaceChildren(form);
    form.querySelector("textarea")?.focus();
    form.scrollIntoView({ block: "nearest" });
  }

  #close() {
    this.#show();
    (this.#rating === "up" ? this.#up : this.#down).focus();
  }

  /** @param {Event} event */
  async #submit(event) {
    event.preventDefault();
    const given = new FormData(/** @type {HTMLFormElement} */ (event.target));
    const correction = String(given.get("correction") ?? "").trim();
    const comment = String(given.get("comment") ?? "").trim();
    const opinion = {
      rating: this.#rating,
      ...(correction && correction !== this.answer.content.trim() ? { correction } : {}),
      ...(comment ? { comment } : {}),
    };
    if (same(opinion, this.answer.vote) || (await this.#send(opinion))) this.#close();
  }
}

/**
 * @param {Opinion} opinion
 * @param {Vote | null} vote
 */
function same(opinion, vote) {
  return opinion.rating === vote?.rating && opinion.correction === vote.correction && opinion.comment === vote.comment;
}

/**
 * @param {string} name
 * @param {string} label
 * @param {string} value
 */
function field(name, label, value) {
  const id = `${name}-${(forms += 1)}`;
  const area = make("textarea", { id, name, rows: name === "correction" ? "3" : "1" });
  area.value = value;
  return [make("label", { for: id }, label), area];
}

/**
 * @param {Vote} vote
 * @param {() => void} edit
 */
function summary(vote, edit) {
  const said = vote.rating === "up" ? "You found this good." : "You found this bad.";
  return make(
    "div",
    { class: "voted" },
    make(
      "p",
      {},
      vote.correction ? "You corrected this answer. " : `${said} `,
      make("span", { class: "faint" }, `Stored as ${vote.id.slice(0, 11)}. `),
      make("button", { type: "button", class: "plain", click: edit }, "Change"),
    ),
    vote.correction && make("blockquote", {}, icon("pen"), make("span", {}, vote.correction)),
    vote.comment && make("blockquote", {}, icon("comment"), make("span", {}, vote.comment)),
  );
}

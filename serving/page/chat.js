// The page: one conversation that is open, the answer that is being written, and the list of those that are past.

import { AnswerView } from "./answer.js";
import { askForKey } from "./api-key.js";
import { ask } from "./asking.js";
import { Composer } from "./composer.js";
import { confirmation, load, messages, newConversation, remove, save, title, watch } from "./conversations.js";
import { byId, make } from "./dom.js";
import { Refused, models } from "./endpoint.js";
import { listen } from "./keyboard.js";
import { closeLineage, openLineage, prepareLineage } from "./lineage.js";
import { clearNotice, failed, notice } from "./notice.js";
import { Sidebar } from "./sidebar.js";
import { switchTheme } from "./theme.js";
import { Transcript } from "./transcript.js";

/** @typedef {import("./conversations.js").Answer} Answer */
/** @typedef {import("./conversations.js").Conversation} Conversation */
/** @typedef {import("./conversations.js").Turn} Turn */

const LOOK_AGAIN_MILLISECONDS = 2000;
const UNKEPT = "This browser does not keep the conversation: it has no room left for it, or is told to keep nothing.";
/** The first answer is the likeliest; a further one has to be another. */
const ANOTHER = { temperature: 0.8 };

class Chat {
  #transcript = new Transcript();
  #composer = new Composer(
    (question, attachments) => this.#send(question, attachments),
    () => this.stop(),
  );
  #sidebar = new Sidebar((id) => this.#delete(id));
  /** @type {Conversation} */
  #conversation = newConversation();
  /** @type {WeakMap<Turn, HTMLElement>} where the answer to a question stands */
  #places = new WeakMap();
  /** @type {AbortController | null} of the answer that is being written */
  #running = null;
  /** @type {Promise<void>} over when it is */
  #written = Promise.resolve();

  constructor() {
    for (const button of document.querySelectorAll(".new")) button.addEventListener("click", () => this.begin());
    addEventListener("hashchange", () => this.#goTo());
    addEventListener("pagehide", () => this.#running && this.#keep());
    watch(() => this.#sidebar.show(this.#conversation.id));
    this.#goTo();
  }

  /** Start anew. */
  async begin() {
    if (location.hash) history.pushState(null, "", location.pathname + location.search);
    await this.open(null);
    this.#sidebar.slide(false);
    this.#composer.focus();
  }

  /** @param {Conversation | null} conversation null for a new one */
  async open(conversation) {
    await this.stop();
    clearNotice();
    this.#conversation = conversation ?? newConversation();
    this.#transcript.clear();
    for (const turn of this.#conversation.turns) this.#show(turn);
    this.#sidebar.show(this.#conversation.id);
    document.title = conversation ? `${title(conversation)} · Loopwright` : "Loopwright";
    this.#transcript.toEnd();
  }

  /** Stop the answer that is being written, and wait until it has. */
  stop() {
    this.#running?.abort();
    return this.#written;
  }

  /** What Escape means, from the outermost thing that is open. */
  escape() {
    if (this.#sidebar.over) this.#sidebar.slide(false);
    else if (byId("lineage").contains(document.activeElement)) closeLineage();
    else if (this.#running) this.stop();
    else closeLineage();
  }

  lineageOfLatest() {
    const turn = this.#conversation.turns.at(-1);
    const answer = turn?.answers[turn.shown];
    if (answer) openLineage(answer.id);
  }

  focus() {
    this.#composer.focus();
  }

  #goTo() {
    const id = location.hash.slice(1);
    if (id !== this.#conversation.id || !this.#conversation.turns.length) this.open(id ? load(id) : null);
  }

  /** @param {boolean} sees whether the model does */
  set sees(sees) {
    this.#composer.sees = sees;
  }

  /**
   * @param {string} question
   * @param {import("./pictures.js").Attachment[]} attachments
   */
  #send(question, attachments) {
    const turn = { question, answers: [], shown: 0, ...(attachments.length ? { attachments } : {}) };
    if (!this.#conversation.turns.length) history.replaceState(null, "", `#${this.#conversation.id}`);
    this.#conversation.turns.push(turn);
    document.title = `${title(this.#conversation)} · Loopwright`;
    this.#keep();
    this.#show(turn);
    this.#transcript.toEnd();
    this.#answer(turn);
  }

  #keep() {
    this.#conversation.updated = Date.now() / 1000;
    if (!save(this.#conversation)) notice(UNKEPT);
    this.#sidebar.show(this.#conversation.id);
  }

  /** @param {string} id */
  async #delete(id) {
    const conversation = load(id);
    const current = id === this.#conversation.id;
    if (current) await this.stop();
    remove(id);
    if (current) await this.begin();
    else this.#sidebar.show(this.#conversation.id);
    if (!conversation) return;
    const undo = () => {
      save(conversation);
      this.#sidebar.show(this.#conversation.id);
    };
    notice(`Deleted “${shortened(title(conversation))}” from this browser.`, { label: "Undo", act: undo });
  }

  /**
   * Show a turn with the answer that is chosen, or the offer to ask once more where there is none.
   *
   * @param {Turn} turn
   */
  #show(turn) {
    const place = this.#places.get(turn) ?? this.#transcript.add(turn.question, turn.attachments ?? []);
    this.#places.set(turn, place);
    const answer = turn.answers[turn.shown];
    if (!answer) {
      const again = make(
        "button",
        { type: "button", class: "plain again", click: () => this.#answer(turn) },
        "Ask again",
      );
      place.replaceChildren(make("p", { class: "state" }, "Not answered. ", again));
      return;
    }
    const view = new AnswerView(answer);
    place.replaceChildren(view.element);
    this.#finish(view, turn);
  }

  /**
   * @param {AnswerView} view
   * @param {Turn} turn
   */
  #finish(view, turn) {
    view.finish(turn.shown, turn.answers.length, {
      changed: () => this.#keep(),
      refused: (error) => refused(error),
      again: () => this.#answer(turn),
      confirm: () => this.#answer(turn, turn.answers[turn.shown]),
      turnTo: (index) => {
        turn.shown = index;
        this.#keep();
        this.#show(turn);
      },
    });
  }

  /**
   * @param {Turn} turn the last one
   * @param {Answer} [confirmed] to it, whose calls a person confirmed
   */
  #answer(turn, confirmed) {
    if (this.#running) return;
    clearNotice();
    this.#running = new AbortController();
    this.#busy(true);
    this.#written = this.#write(turn, this.#running.signal, confirmed);
  }

  /** @param {boolean} busy */
  #busy(busy) {
    this.#composer.busy = busy;
    this.#transcript.writing = busy;
  }

  /**
   * Write one more answer to a question.
   *
   * @param {Turn} turn
   * @param {AbortSignal} signal
   * @param {Answer} [confirmed]
   */
  async #write(turn, signal, confirmed) {
    const began = Date.now() / 1000;
    /** @type {Answer} */
    const answer = {
      id: "",
      model: "",
      content: "",
      steps: [],
      created: began,
      seconds: 0,
      ended: "broken",
      vote: null,
      calls: [],
      after: confirmed,
    };
    const view = new AnswerView(answer);
    this.#places.get(turn)?.replaceChildren(view.element);
    view.wait();
    const told = [...messages(this.#conversation.turns), ...(confirmed ? confirmation(confirmed) : [])];
    const run = confirmed && { confirmed_tool_calls: confirmed.calls?.map((call) => call.id) };
    const options = run || (turn.answers.length ? ANOTHER : {});
    let problem = null;
    try {
      for await (const chunk of ask(told, options, signal, (line) => view.waitFor(line), forgot)) {
        if (!answer.id) turn.shown = turn.answers.push(answer) - 1;
        grow(answer, chunk);
        view.grow(chunk);
      }
    } catch (error) {
      if (signal.aborted) answer.ended = "stopped";
      else problem = error;
    }
    answer.seconds = Date.now() / 1000 - began;
    this.#running = null;
    this.#busy(false);
    this.#keep();
    if (answer.id) this.#finish(view, turn);
    else this.#show(turn);
    if (problem) refused(problem, () => this.#answer(turn, confirmed));
    else if (answer.model && !byId("served").textContent?.includes(answer.model)) served();
  }
}

/**
 * @param {Answer} answer
 * @param {import("./stream.js").Chunk} chunk
 */
function grow(answer, { id, model, text, steps, calls, reason }) {
  answer.id = id;
  answer.model = model;
  answer.content += text;
  answer.steps.push(...steps);
  answer.calls?.push(...calls);
  answer.ended = reason ?? answer.ended;
}

/** @param {number} count of messages */
function forgot(count) {
  notice(`This conversation is longer than the model can read: its first ${count} messages were left out.`);
}

/**
 * Say what was refused; where a key is wanted, ask for it and go on.
 *
 * @param {unknown} error
 * @param {() => void} [again]
 */
async function refused(error, again) {
  if (!(error instanceof Refused) || error.code !== "invalid_api_key") failed(error, again);
  else if (await askForKey()) again?.();
  else failed(error, again);
}

/** @param {string} text */
function shortened(text) {
  return text.length > 40 ? `${text.slice(0, 39)}…` : text;
}

/** Say which models answer; while they load, look again. */
async function served() {
  const line = byId("served");
  try {
    const found = await models();
    chat.sees = found.some((model) => model.modalities?.includes("image"));
    line.dataset.state = found.length ? "ready" : "loading";
    line.replaceChildren(...(found.length ? found.map(described) : ["The model is loading …"]));
    if (!found.length) setTimeout(served, LOOK_AGAIN_MILLISECONDS);
  } catch (error) {
    line.dataset.state = "away";
    line.textContent = "The endpoint does not say which model answers";
    await refused(error, served);
  }
}

/** @param {import("./endpoint.js").Model} model */
function described({ id, role, context_length: tokens }) {
  const reads = tokens ? `reads ${tokens} tokens` : null;
  return make("span", { title: reads }, make("strong", {}, id), role ? ` ${role}` : "");
}

prepareLineage();
const chat = new Chat();
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  chat.focus();
});
byId("switch-theme").addEventListener("click", switchTheme);
listen({ "/": () => chat.focus(), n: () => chat.begin(), l: () => chat.lineageOfLatest() }, () => chat.escape());
chat.focus();
served();

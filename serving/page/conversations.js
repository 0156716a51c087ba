// Past conversations, kept in this browser's localStorage: one entry each, so that two tabs do not undo each other.

import { uniqueId } from "./endpoint.js";

/**
 * What was voted on an answer, once the endpoint has it.
 * @typedef {{id: string, rating: "up" | "down", correction?: string, comment?: string}} Vote
 *
 * One answer. `ended` is OpenAI's finish reason, or "stopped" by the person, or "broken" by an error; times are in
 * seconds since the epoch.
 * @typedef {{id: string, model: string, content: string, steps: import("./stream.js").Step[], created: number,
 *   seconds: number, ended: string, vote: Vote | null}} Answer
 *
 * A question with every answer that was made to it; the conversation goes on from the one that is shown.
 * @typedef {{question: string, answers: Answer[], shown: number}} Turn
 *
 * @typedef {{id: string, updated: number, turns: Turn[]}} Conversation
 */

const PREFIX = "loopwright.conversation.";
/** @type {Map<string, string>} where the browser lets us keep nothing */
const memory = new Map();

/** @returns {Conversation} */
export function newConversation() {
  return { id: uniqueId().slice(0, 12), updated: Date.now() / 1000, turns: [] };
}

/** @returns {Conversation[]} the latest first */
export function listed() {
  return keys()
    .map((key) => read(key))
    .filter((found) => found !== null)
    .sort((a, b) => b.updated - a.updated);
}

/**
 * @param {string} id
 * @returns {Conversation | null}
 */
export function load(id) {
  return read(PREFIX + id);
}

/**
 * Keep a conversation as it is now.
 *
 * @param {Conversation} conversation
 * @returns {boolean} false when the browser has no room for it
 */
export function save(conversation) {
  const key = PREFIX + conversation.id;
  const text = JSON.stringify(conversation);
  try {
    localStorage.setItem(key, text);
    memory.delete(key);
    return true;
  } catch {
    memory.set(key, text);
    return false;
  }
}

/** @param {string} id */
export function remove(id) {
  memory.delete(PREFIX + id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // Nothing can be kept here, so nothing was.
  }
}

/**
 * @param {Conversation} conversation
 * @returns {string} its first question
 */
export function title(conversation) {
  return conversation.turns[0]?.question ?? "New conversation";
}

/**
 * What the model is told: each question that was answered, with the answer that is shown, and the last one.
 *
 * @param {Turn[]} turns
 * @returns {import("./stream.js").Message[]}
 */
export function messages(turns) {
  return turns.flatMap((turn, index) => {
    const asked = /** @type {const} */ ({ role: "user", content: turn.question });
    if (index === turns.length - 1) return [asked];
    const content = turn.answers[turn.shown]?.content;
    return content ? [asked, { role: /** @type {const} */ ("assistant"), content }] : [];
  });
}

/** @param {(id: string) => void} changed is told when another tab kept or deleted a conversation */
export function watch(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed(event.key?.slice(PREFIX.length) ?? "");
  });
}

/** @returns {string[]} */
function keys() {
  const found = new Set(memory.keys());
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(PREFIX)) found.add(key);
  } catch {
    // No storage: what this tab remembers is all there is.
  }
  return [...found];
}

/**
 * @param {string} key
 * @returns {Conversation | null} null where there is none, or it is not ours to read
 */
function read(key) {
  try {
    const found = JSON.parse(memory.get(key) ?? localStorage.getItem(key) ?? "null");
    return found && Array.isArray(found.turns) ? found : null;
  } catch {
    return null;
  }
}

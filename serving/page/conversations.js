// Past conversations, kept in this browser's localStorage: one entry each, so that two tabs do not undo each other.

import { uniqueId } from "./endpoint.js";
import { local } from "./kept.js";

/**
 * What was voted on an answer, once the endpoint has it.
 * @typedef {{id: string, rating: "up" | "down", correction?: string, comment?: string}} Vote
 *
 * One answer. `ended` is OpenAI's finish reason, or "stopped" by the person, or "broken" by an error; times are in
 * seconds since the epoch. `calls` wait for a person; `after` is the answer whose calls were confirmed for this one.
 * @typedef {{id: string, model: string, content: string, steps: import("./stream.js").Step[], created: number,
 *   seconds: number, ended: string, vote: Vote | null, calls?: import("./stream.js").Call[], after?: Answer}} Answer
 *
 * A question with every answer that was made to it; the conversation goes on from the one that is shown.
 * @typedef {{question: string, attachments?: import("./pictures.js").Attachment[], answers: Answer[],
 *   shown: number}} Turn
 *
 * @typedef {{id: string, updated: number, turns: Turn[]}} Conversation
 */

const PREFIX = "loopwright.conversation.";

/** @returns {Conversation} */
export function newConversation() {
  return { id: uniqueId().slice(0, 12), updated: Date.now() / 1000, turns: [] };
}

/** @returns {Conversation[]} the latest first */
export function listed() {
  return local
    .keys()
    .filter((key) => key.startsWith(PREFIX))
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
 * @returns {boolean} false when the browser does not let us, or has no room for it
 */
export function save(conversation) {
  return local.write(PREFIX + conversation.id, JSON.stringify(conversation));
}

/** @param {string} id */
export function remove(id) {
  local.remove(PREFIX + id);
}

/**
 * @param {Conversation} conversation
 * @returns {string} its first question, or the name of what was sent without words
 */
export function title(conversation) {
  const first = conversation.turns[0];
  return first ? first.question || first.attachments?.[0]?.name || "" : "New conversation";
}

/**
 * What the model is told: each question that was answered, with the answer that is shown, and the last one.
 *
 * @param {Turn[]} turns
 * @returns {import("./stream.js").Message[]}
 */
export function messages(turns) {
  return turns.flatMap((turn, index) => {
    const asked = /** @type {const} */ ({ role: "user", content: content(turn) });
    if (index === turns.length - 1) return [asked];
    const answer = turn.answers[turn.shown]?.content;
    return answer ? [asked, { role: /** @type {const} */ ("assistant"), content: answer }] : [];
  });
}

/**
 * What the model is told behind the question when the calls of an answer are confirmed.
 *
 * @param {Answer} answer
 * @returns {import("./stream.js").Message[]}
 */
export function confirmation({ content, calls, steps, after }) {
  const results = steps.filter((step) => step.type === "result");
  const ran = (after?.calls ?? []).map((call, index) => {
    const result = results[index]?.content ?? "";
    return { role: /** @type {const} */ ("tool"), tool_call_id: call.id, content: result };
  });
  const earlier = after ? [...confirmation(after), ...ran] : [];
  return [...earlier, { role: "assistant", content: content || null, tool_calls: calls }];
}

/**
 * @param {Turn} turn
 * @returns {string | import("./stream.js").Part[]} its question, behind the pictures and clips that go with it
 */
function content({ question, attachments }) {
  if (!attachments?.length) return question;
  const parts = attachments.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
  return question ? [...parts, { type: "text", text: question }] : parts;
}

/** @param {() => void} changed is called when another tab kept or deleted a conversation */
export function watch(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) changed();
  });
}

/**
 * @param {string} key
 * @returns {Conversation | null} null where there is none, or it is not ours to read
 */
function read(key) {
  try {
    const found = JSON.parse(local.read(key) ?? "null");
    return found && Array.isArray(found.turns) ? found : null;
  } catch {
    return null;
  }
}

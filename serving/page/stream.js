// A chat completion as it is written: OpenAI's server-sent events, one object each.

import { Refused, call } from "./endpoint.js";

/**
 * A step of the agent: a call of one of its tools, or what the tool gave back.
 * @typedef {{type: "call" | "result", name: string, arguments?: Record<string, unknown>, content?: string}} Step
 *
 * A call of OpenAI's that waits for a person; its arguments are JSON.
 * @typedef {{id: string, function: {name: string, arguments: string}}} Call
 *
 * What is new in a chunk; `reason` comes with the last one.
 * @typedef {{id: string, model: string, text: string, steps: Step[], calls: Call[], reason: string | null}} Chunk
 *
 * A content part: `type`, and what has the type's name.
 * @typedef {{type: string, [value: string]: unknown}} Part
 *
 * @typedef {{role: "user" | "assistant" | "tool", content: string | Part[] | null, tool_calls?: Call[],
 *   tool_call_id?: string}} Message
 */

/**
 * Ask, and give the chunks of the answer as they come.
 *
 * @param {Message[]} messages
 * @param {{temperature?: number, seed?: number, confirmed_tool_calls?: string[]}} options
 * @param {AbortSignal} signal stops the answer, also where it is written
 * @returns {AsyncGenerator<Chunk, void, void>}
 * @throws {Refused} at once, or when the answer broke off
 */
export async function* completion(messages, options, signal) {
  const body = JSON.stringify({ messages, stream: true, ...options });
  const response = await call("v1/chat/completions", { method: "POST", body, signal });
  for await (const data of events(/** @type {ReadableStream<Uint8Array>} */ (response.body))) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message, chunk.error.code);
    const [choice] = chunk.choices;
    if (!choice) continue;
    const { content, steps = [], tool_calls: calls = [] } = choice.delta;
    yield { id: chunk.id, model: chunk.model, text: content ?? "", steps, calls, reason: choice.finish_reason };
  }
  throw new Refused(0, "The answer broke off: the connection was lost.");
}

/**
 * The data of each server-sent event, however the network cut them.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string, void, void>}
 */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(lost);
      text += decoder.decode(value, { stream: !done });
      const parts = text.split("\n\n");
      text = parts.pop() ?? "";
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.releaseLock();
  }
}

/**
 * @param {unknown} error of a read
 * @returns {never}
 */
function lost(error) {
  if (error instanceof DOMException && error.name === "AbortError") throw error;
  throw new Refused(0, "The answer broke off: the connection was lost.");
}

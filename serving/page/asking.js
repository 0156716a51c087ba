// One question asked with patience: it waits while the model loads, and lets go of the oldest exchange when the
// conversation outgrew what the model can read.

import { Refused } from "./endpoint.js";
import { completion } from "./stream.js";

/** @typedef {import("./stream.js").Message} Message */
/** @typedef {import("./stream.js").Chunk} Chunk */

const RETRY_SECONDS = 2;
const WAITED_FOR = new Set(["loading", "draining", "not_ready"]);

/**
 * The chunks of the answer to the last message.
 *
 * @param {Message[]} messages
 * @param {{temperature?: number, seed?: number, confirmed_tool_calls?: string[]}} options
 * @param {AbortSignal} signal
 * @param {(said: string) => void} tell is given a line when there is something to wait for
 * @param {(count: number) => void} forgot is given how many messages the model no longer reads
 * @returns {AsyncGenerator<Chunk, void, void>}
 * @throws {Refused}
 */
export async function* ask(messages, options, signal, tell, forgot) {
  let kept = messages;
  for (;;) {
    try {
      yield* completion(kept, options, signal);
      return;
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (error.code === "context_length_exceeded" && kept.length > 2) {
        kept = kept.slice(2);
        forgot(messages.length - kept.length);
      } else if (error.status === 503 && WAITED_FOR.has(error.code ?? "")) {
        tell("The model is still loading. Your question waits and is asked as soon as it answers.");
        await pause(error.retrySeconds ?? RETRY_SECONDS, signal);
      } else {
        throw error;
      }
    }
  }
}

/**
 * @param {number} seconds
 * @param {AbortSignal} signal ends the pause at once, with its reason
 * @returns {Promise<void>}
 */
function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal.addEventListener("abort", stop, { once: true });
  });
}

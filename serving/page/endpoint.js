// The endpoint's routes. Addresses are relative to the page, so that it also works below a path of a proxy.

import { session } from "./kept.js";

const KEY = "loopwright.key";
const VOTE_TRIES = 2;

/** Every answer other than 2xx, with what the endpoint said about it. */
export class Refused extends Error {
  /**
   * @param {number} status HTTP status; 0 when nothing answered
   * @param {string} message
   * @param {string | null} [code] OpenAI's code
   * @param {number | null} [retrySeconds] of the Retry-After header
   */
  constructor(status, message, code = null, retrySeconds = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retrySeconds = retrySeconds;
  }
}

/** The API key that this tab sends, "" without one; it is forgotten when the tab is closed. */
export function apiKey() {
  return session.read(KEY) ?? "";
}

/** @param {string} key */
export function setApiKey(key) {
  if (key) session.write(KEY, key);
  else session.remove(KEY);
}

/**
 * @param {string} path such as "v1/models"
 * @param {RequestInit & {body?: string}} [request]
 * @returns {Promise<Response>} with a status of 2xx
 * @throws {Refused}
 */
export async function call(path, request = {}) {
  const headers = new Headers(request.headers);
  if (apiKey()) headers.set("Authorization", `Bearer ${apiKey()}`);
  if (request.body) headers.set("Content-Type", "application/json");
  let response;
  try {
    response = await fetch(path, { ...request, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Refused(0, "The endpoint does not answer. Is it running, and is this machine online?");
  }
  if (response.ok) return response;
  throw await refusal(response);
}

/**
 * @param {Response} response
 * @returns {Promise<Refused>}
 */
async function refusal(response) {
  const after = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const seconds = Number.isFinite(after) ? after : null;
  try {
    const { error } = await response.json();
    return new Refused(response.status, error.message, error.code, seconds);
  } catch {
    return new Refused(response.status, `The endpoint answered ${response.status}.`, null, seconds);
  }
}

/**
 * @typedef {{id: string, role?: string, task?: string, context_length?: number, modalities?: string[]}} Model
 * @returns {Promise<Model[]>} which models answer chats; empty while they load
 */
export async function models() {
  /** @type {Model[]} */
  const served = (await (await call("v1/models")).json()).data;
  return served.filter((model) => model.task === "chat");
}

/**
 * @param {string} completionId
 * @returns {Promise<any>} what `loopwright trace` prints
 */
export async function lineage(completionId) {
  return (await call(`v1/lineage/${encodeURIComponent(completionId)}`)).json();
}

/** @returns {Promise<any>} champions, runs, feedback, drift and links */
export async function overview() {
  return (await call("v1/registry")).json();
}

/**
 * @param {string} model such as "agent/3"
 * @returns {Promise<any>} the version with its model card
 */
export async function modelCard(model) {
  return (await call(`v1/registry/${model}`)).json();
}

/**
 * @param {string} path of a picture, as the lineage gives it
 * @returns {Promise<Blob>}
 */
export async function pictureFile(path) {
  return (await call(path.replace(/^\//, ""))).blob();
}

/**
 * Send one vote. A network that fails in between is tried again with the same key, and counts once.
 *
 * @param {{completion_id: string, rating: "up" | "down", correction?: string, comment?: string}} vote
 * @returns {Promise<string>} the id of the feedback, which is on disk by then
 */
export async function sendVote(vote) {
  const request = { method: "POST", body: JSON.stringify(vote), headers: { "Idempotency-Key": uniqueId() } };
  for (let left = VOTE_TRIES; ; left -= 1) {
    try {
      return (await (await call("v1/feedback", request)).json()).id;
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 0 || left <= 1) throw error;
    }
  }
}

/** 128 random bits. (`crypto.randomUUID` is missing where a page came over plain HTTP.) */
export function uniqueId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

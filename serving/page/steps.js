// The agent's steps, folded under its answer: each call of a tool, with what the tool gave back.

import { counted, make } from "./dom.js";

/** @typedef {import("./stream.js").Step} Step */

/**
 * A call as Python would write it.
 *
 * @param {Step} step
 */
export function written(step) {
  const given = Object.entries(step.arguments ?? {}).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  return `${step.name}(${given.join(", ")})`;
}

/**
 * @param {Step} step
 * @returns {HTMLLIElement}
 */
export function stepItem(step) {
  const called = step.type === "call";
  return make(
    "li",
    { class: step.type },
    make("span", { class: "label" }, called ? "Called" : "Got"),
    make("code", {}, called ? written(step) : (step.content ?? "")),
  );
}

/** The folded list; hidden while there is nothing in it. */
export class StepsView {
  #title = make("summary");
  #list = make("ol", { class: "steps" });
  element = make("details", { class: "fold", hidden: true }, this.#title, this.#list);
  /** @type {Step[]} */
  #steps = [];

  /** @param {Step[]} steps that came next */
  add(steps) {
    if (!steps.length) return;
    this.#steps.push(...steps);
    this.#list.append(...steps.map(stepItem));
    const calls = this.#steps.filter((step) => step.type === "call");
    const names = [...new Set(calls.map((step) => step.name))].join(", ");
    this.#title.textContent = `${counted(calls.length, "step")}: ${names}`;
    this.element.hidden = false;
  }
}

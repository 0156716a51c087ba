// The little Markdown that answers are written in: code, lists, headings, emphasis. Built of DOM nodes, never of HTML
// text, and links stay text: what a model writes cannot act on this page.

import { iconButton, make } from "./dom.js";

const FENCE = /^\s*```(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const TABLE = /^\|.*\|\s*$/;
const DASHES = /^\|(\s*:?-+:?\s*\|)+\s*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
/** An indented line goes on with its item; an indented block of code does not. */
const MORE = /^\s+(?!```)\S/;
const INLINE =
  /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(?=\S)(.+?)(?<=\S)\*\*|(?<![\w*])\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?![\w*])/s;

/**
 * A piece of text that is shown as one element. `source` tells two of them apart.
 * @typedef {{kind: "code" | "heading" | "list" | "table" | "text", source: string}} Block
 */

/**
 * Show text in an element, keeping what is already there and still right: so a text that grows can be shown again and
 * again, and a selection in it lives on.
 *
 * @param {HTMLElement} element
 * @param {string} text
 * @param {(code: string) => void} copy copies a block of code
 */
export function show(element, text, copy) {
  const wanted = blocks(text);
  wanted.forEach((block, index) => {
    const there = /** @type {HTMLElement | undefined} */ (element.children[index]);
    if (there && shown.get(there) === block.source) return;
    const made = elementOf(block, copy);
    shown.set(made, block.source);
    if (there) there.replaceWith(made);
    else element.append(made);
  });
  while (element.children.length > wanted.length) element.lastElementChild?.remove();
}

/** @type {WeakMap<Element, string>} */
const shown = new WeakMap();

/**
 * @param {string} text
 * @returns {Block[]}
 */
export function blocks(text) {
  /** @type {Block[]} */
  const found = [];
  /** @type {string[]} */
  const lines = text.split("\n");
  while (lines.length) {
    if (!lines[0].trim()) lines.shift();
    else if (FENCE.test(lines[0])) found.push({ kind: "code", source: fenced(lines) });
    else if (HEADING.test(lines[0])) found.push({ kind: "heading", source: /** @type {string} */ (lines.shift()) });
    else if (DASHES.test(lines[1] ?? "") && TABLE.test(lines[0]))
      found.push({ kind: "table", source: taken(lines, (line) => TABLE.test(line)) });
    else if (ITEM.test(lines[0]))
      found.push({ kind: "list", source: taken(lines, (line) => ITEM.test(line) || MORE.test(line)) });
    else
      found.push({
        kind: "text",
        source: taken(lines, (line) => ![FENCE, HEADING, ITEM].some((start) => start.test(line))),
      });
  }
  return found;
}

/**
 * Take a block of code off the front, with its opening fence; without its end it goes on to the end of the text.
 *
 * @param {string[]} lines
 */
function fenced(lines) {
  const [opening] = lines.splice(0, 1);
  const end = lines.findIndex((line) => FENCE.test(line));
  const code = lines.splice(0, end < 0 ? lines.length : end);
  if (end >= 0) lines.shift();
  return [opening, ...code].join("\n");
}

/**
 * Take the first line, and what follows while it belongs to it and is not empty.
 *
 * @param {string[]} lines
 * @param {(line: string) => boolean} belongs
 */
function taken(lines, belongs) {
  const end = lines.findIndex((line, index) => index > 0 && (!line.trim() || !belongs(line)));
  return lines.splice(0, end < 0 ? lines.length : end).join("\n");
}

/**
 * @param {Block} block
 * @param {(code: string) => void} copy
 * @returns {HTMLElement}
 */
function elementOf({ kind, source }, copy) {
  if (kind === "code") return codeBlock(source, copy);
  if (kind === "heading") return make("p", { class: "heading" }, ...inline(source.replace(HEADING, "$1")));
  if (kind === "list") return list(source.split("\n"));
  if (kind === "table") return table(source.split("\n"));
  return make("p", {}, ...inline(source.trim()));
}

/**
 * @param {string} source
 * @param {(code: string) => void} copy
 */
function codeBlock(source, copy) {
  const code = source.slice(source.indexOf("\n") + 1 || source.length);
  const language = (FENCE.exec(source.split("\n", 1)[0])?.[1] ?? "").trim();
  return make(
    "div",
    { class: "code" },
    make(
      "pre",
      { tabindex: "0", role: "group", "aria-label": language ? `Code, ${language}` : "Code" },
      make("code", {}, code),
    ),
    iconButton("Copy code", "copy", () => copy(code)),
  );
}

/**
 * A table with its heads; on a narrow screen it scrolls by itself.
 *
 * @param {string[]} lines
 * @returns {HTMLElement}
 */
function table([head, , ...lines]) {
  const heads = cells(head).map((text) => make("th", { scope: "col" }, ...inline(text)));
  const rows = lines.map((line) => make("tr", {}, ...cells(line).map((text) => make("td", {}, ...inline(text)))));
  return make(
    "div",
    { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)),
  );
}

/** @param {string} line of a table */
function cells(line) {
  const inner = line.trim().replace(/^\||\|$/g, "");
  return inner.split(/(?<!\\)\|/).map((text) => text.replaceAll("\\|", "|").trim());
}

/**
 * A list; lines that are indented deeper than its first are lists inside its items, or go on with their text.
 *
 * @param {string[]} lines
 * @returns {HTMLElement}
 */
function list(lines) {
  const first = /** @type {RegExpExecArray} */ (ITEM.exec(lines[0]));
  const depth = first[1].length;
  const element = first[2] ? make("ol", { start: first[2] === "1" ? null : first[2] }) : make("ul");
  while (lines.length) {
    const [, , , said] = /** @type {RegExpExecArray} */ (ITEM.exec(/** @type {string} */ (lines.shift())));
    const end = lines.findIndex((line) => (ITEM.exec(line)?.[1].length ?? Infinity) <= depth);
    const inner = lines.splice(0, end < 0 ? lines.length : end);
    const deeper = inner.findIndex((line) => ITEM.test(line));
    const more = inner.splice(0, deeper < 0 ? inner.length : deeper);
    const text = [said, ...more.map((line) => line.trim())].join("\n");
    element.append(make("li", {}, ...inline(text), inner.length > 0 && list(inner)));
  }
  return element;
}

/**
 * Text with its code spans and emphasis.
 *
 * @param {string} text
 * @returns {(Node | string)[]}
 */
export function inline(text) {
  /** @type {(Node | string)[]} */
  const nodes = [];
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    if (found.index) nodes.push(text.slice(0, found.index));
    if (found[1]) nodes.push(make("code", {}, found[2].trim() || found[2]));
    else if (found[3]) nodes.push(make("strong", {}, ...inline(found[3])));
    else nodes.push(make("em", {}, ...inline(found[4])));
  }
  if (text) nodes.push(text);
  return nodes;
}

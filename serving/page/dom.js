// Elements out of plain calls. Text only ever becomes text nodes: nothing here, or built on it, reads HTML.

/**
 * An element with attributes and children; a string becomes text. `null`, `false` and `undefined` are left out of both.
 * Attributes whose value is a function are listeners: `{click: () => ...}`.
 *
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, unknown>} [attributes]
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElementTagNameMap[Tag]}
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, /** @type {EventListener} */ (value));
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * One of the symbols of index.html, hidden from screen readers: whatever holds it has a label of its own.
 *
 * @param {string} name
 * @returns {SVGSVGElement}
 */
export function icon(name) {
  const namespace = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(namespace, "svg");
  picture.setAttribute("class", "icon");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(namespace, "use");
  use.setAttribute("href", `#icon-${name}`);
  picture.append(use);
  return picture;
}

/**
 * A button that shows an icon alone, and says its label to whoever hovers or listens.
 *
 * @param {string} label
 * @param {string} picture
 * @param {(event: MouseEvent) => void} click
 * @param {Record<string, unknown>} [attributes]
 */
export function iconButton(label, picture, click, attributes = {}) {
  return make(
    "button",
    { type: "button", class: "quiet", title: label, "aria-label": label, ...attributes, click },
    icon(picture),
  );
}

/**
 * The element with an id, which index.html has.
 *
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`index.html has no #${id}`);
  return element;
}

/**
 * @param {number} seconds since the epoch
 * @returns {string} the day and time, as people here write them
 */
export function when(seconds) {
  const moment = new Date(seconds * 1000);
  const today = moment.toDateString() === new Date().toDateString();
  const options = /** @type {const} */ ({ hour: "2-digit", minute: "2-digit" });
  if (today) return moment.toLocaleTimeString(undefined, options);
  return moment.toLocaleString(undefined, { day: "numeric", month: "short", ...options });
}

/**
 * @param {number} count
 * @param {string} noun in the singular
 */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// The list of past conversations. On a narrow screen it lies over the page and is opened with a button.

import { byId, iconButton, make, when } from "./dom.js";
import { listed, title } from "./conversations.js";

const wide = matchMedia("(min-width: 52rem)");

/** The list, kept right by `show`. */
export class Sidebar {
  /** @param {(id: string) => void} remove */
  constructor(remove) {
    this.remove = remove;
    byId("open-conversations").addEventListener("click", () => this.slide(true));
    byId("close-conversations").addEventListener("click", () => this.slide(false));
    byId("shade").addEventListener("click", () => this.slide(false));
    byId("past").addEventListener("keydown", (event) => this.#key(event));
    wide.addEventListener("change", () => this.slide(false));
  }

  /** @param {string} current the id of the conversation that is open */
  show(current) {
    const rows = listed().map((conversation) => {
      const name = title(conversation);
      const mine = conversation.id === current;
      const link = make(
        "a",
        { href: `#${conversation.id}`, "aria-current": mine ? "page" : null, click: () => this.slide(false) },
        make("span", { class: "title" }, name),
        make("time", { datetime: new Date(conversation.updated * 1000).toISOString() }, when(conversation.updated)),
      );
      const drop = iconButton(`Delete: ${name}`, "bin", () => this.remove(conversation.id));
      return make("li", {}, link, drop);
    });
    const here = this.#focused();
    byId("past").replaceChildren(...rows);
    byId("none-past").hidden = rows.length > 0;
    if (here >= 0) (this.#links()[Math.min(here, rows.length - 1)] ?? byId("new")).focus();
  }

  /** @returns {boolean} whether it lies over the page now */
  get over() {
    return document.body.classList.contains("with-conversations");
  }

  /** @param {boolean} out over the page, where it does not stand beside it anyway */
  slide(out) {
    const over = out && !wide.matches;
    const was = this.over;
    document.body.classList.toggle("with-conversations", over);
    byId("main").inert = over;
    byId("open-conversations").setAttribute("aria-expanded", String(over));
    if (over) byId("close-conversations").focus();
    else if (was) byId("open-conversations").focus();
  }

  /**
   * Arrows, Home and End walk the list.
   *
   * @param {KeyboardEvent} event
   */
  #key(event) {
    const links = this.#links();
    const here = this.#focused();
    const targets = /** @type {Record<string, number>} */ ({
      ArrowDown: here + 1,
      ArrowUp: here - 1,
      Home: 0,
      End: links.length - 1,
    });
    const wanted = links[targets[event.key]];
    if (!wanted) return;
    event.preventDefault();
    wanted.focus();
  }
  #links() {
    return [...byId("past").querySelectorAll("a")];
  }

  /** @returns {number} which row holds the focus; -1 for none */
  #focused() {
    return this.#links().findIndex((link) => link.parentElement?.contains(document.activeElement));
  }
}

// What the browser keeps for this page. Where it lets a page keep nothing, or has no room, the tab's memory has to do.

/** Texts by key. */
class Kept {
  /** @type {Map<string, string>} */
  #memory = new Map();

  /** @param {() => Storage} place throws where the browser forbids it */
  constructor(place) {
    this.place = place;
  }

  /**
   * @param {string} key
   * @returns {string | null}
   */
  read(key) {
    return this.#memory.get(key) ?? this.#attempt((place) => place.getItem(key), null);
  }

  /**
   * @param {string} key
   * @param {string} text
   * @returns {boolean} whether it outlives this tab's memory
   */
  write(key, text) {
    this.#memory.set(key, text);
    const written = this.#attempt((place) => {
      place.setItem(key, text);
      return true;
    }, false);
    if (written) this.#memory.delete(key);
    return written;
  }

  /** @param {string} key */
  remove(key) {
    this.#memory.delete(key);
    this.#attempt((place) => place.removeItem(key), undefined);
  }

  /** @returns {string[]} */
  keys() {
    return [...new Set([...this.#memory.keys(), ...this.#attempt((place) => Object.keys(place), [])])];
  }

  /**
   * @template Result
   * @param {(place: Storage) => Result} act
   * @param {Result} otherwise
   * @returns {Result}
   */
  #attempt(act, otherwise) {
    try {
      return act(this.place());
    } catch (error) {
      if (error instanceof DOMException) return otherwise;
      throw error;
    }
  }
}

/** Kept until somebody clears it. */
export const local = new Kept(() => localStorage);

/** Kept until the tab is closed. */
export const session = new Kept(() => sessionStorage);

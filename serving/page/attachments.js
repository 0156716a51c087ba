// Pictures and clips for the next question: chosen, pasted or dropped, made small enough to send, and shown until sent.

import { say } from "./announce.js";
import { byId, iconButton, make } from "./dom.js";
import { notice } from "./notice.js";
import { dataUrl, shown } from "./pictures.js";

/** @typedef {import("./pictures.js").Attachment} Attachment */

/** Longest side of a picture as it is sent, in pixels. */
const MAX_SIDE = 1568;
/** Smaller files are sent as they are. */
const SMALL_BYTES = 300_000;
const JPEG_QUALITY = 0.9;
const MAX_CLIP_BYTES = 16_000_000;
const MP4 = "video/mp4";

/** What goes with the next question. */
export class Attachments {
  #list = byId("attached");
  #button = byId("attach");
  #files = /** @type {HTMLInputElement} */ (byId("files"));
  /** @type {Attachment[]} */
  #attached = [];
  /** How many files are being read. */
  #reading = 0;

  constructor() {
    this.#button.addEventListener("click", () => this.#files.click());
    this.#files.addEventListener("change", () => {
      this.#add([...(this.#files.files ?? [])]);
      this.#files.value = "";
    });
    addEventListener("paste", (event) => this.#receive(event, event.clipboardData));
    addEventListener("dragover", (event) => this.#hover(event));
    addEventListener("dragleave", (event) => !event.relatedTarget && this.#drop(false));
    addEventListener("drop", (event) => {
      this.#drop(false);
      this.#receive(event, event.dataTransfer);
    });
  }

  /** @param {boolean} offered whether a model that sees answers */
  set offered(offered) {
    this.#button.hidden = !offered;
  }

  get offered() {
    return !this.#button.hidden;
  }

  /** Whether a file is still being read. */
  get reading() {
    return this.#reading > 0;
  }

  get count() {
    return this.#attached.length;
  }

  /** @returns {Attachment[]} all of them, which are then no longer here */
  take() {
    const attached = this.#attached;
    this.#attached = [];
    this.#show();
    return attached;
  }

  /**
   * @param {Event} event
   * @param {DataTransfer | null} source
   */
  #receive(event, source) {
    if (!this.offered || !source?.files.length) return;
    event.preventDefault();
    this.#add([...source.files]);
  }

  /** @param {DragEvent} event */
  #hover(event) {
    if (!this.offered || !event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    this.#drop(true);
  }

  /** @param {boolean} over whether files are held over the page */
  #drop(over) {
    document.body.classList.toggle("dropping", over);
  }

  /** @param {File[]} files */
  async #add(files) {
    this.#reading += 1;
    try {
      for (const file of files) {
        try {
          this.#attached.push(await attachment(file));
        } catch (error) {
          if (!(error instanceof Unreadable)) throw error;
          notice(error.message);
        }
      }
    } finally {
      this.#reading -= 1;
      this.#show();
    }
    byId("question").focus();
  }

  #show() {
    const items = this.#attached.map((each, index) => {
      const remove = iconButton(`Remove ${each.name}`, "close", () => this.#remove(index));
      return make("li", {}, shown(each), remove);
    });
    this.#list.replaceChildren(...items);
    this.#list.hidden = items.length === 0;
  }

  /** @param {number} index */
  #remove(index) {
    const [removed] = this.#attached.splice(index, 1);
    this.#show();
    say(`Removed ${removed.name}`);
    const next = this.#list.querySelectorAll("button")[Math.min(index, this.#attached.length - 1)];
    (next ?? byId("question")).focus();
  }
}

/** A file that is no picture or clip, or too large; its message says so. */
class Unreadable extends Error {}

/**
 * @param {File} file
 * @returns {Promise<Attachment>}
 * @throws {Unreadable}
 */
async function attachment(file) {
  const name = file.name || "Pasted picture";
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (file.type === MP4 || moves(bytes)) {
    if (file.size > MAX_CLIP_BYTES) throw new Unreadable(`${name} is larger than ${MAX_CLIP_BYTES / 1e6} MB.`);
    return { kind: "video", url: await dataUrl(file), name };
  }
  return { kind: "image", url: await smallPicture(file, name), name };
}

/**
 * The picture as it is, or as a smaller JPEG file.
 *
 * @param {File} file
 * @param {string} name
 */
async function smallPicture(file, name) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Unreadable(`${name} is no picture or clip that can be sent: PNG, JPEG, WebP, GIF or MP4.`);
  });
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= SMALL_BYTES) return dataUrl(file);
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", JPEG_QUALITY);
}

/**
 * Whether a file is an animation: a GIF file of several frames, or a WebP file that says so.
 *
 * @param {Uint8Array} bytes
 */
function moves(bytes) {
  const text = (/** @type {number} */ start, /** @type {number} */ end) =>
    String.fromCharCode(...bytes.subarray(start, end));
  if (text(0, 4) === "GIF8") return frames(bytes) > 1;
  return text(0, 4) === "RIFF" && text(8, 16) === "WEBPVP8X" && (bytes[20] & 2) !== 0;
}

/**
 * @param {Uint8Array} bytes of a GIF file
 * @returns {number} how many frames have a graphic control extension, as those of an animation have
 */
function frames(bytes) {
  let count = 0;
  for (let at = bytes.indexOf(0x21); at >= 0; at = bytes.indexOf(0x21, at + 1))
    if (bytes[at + 1] === 0xf9 && bytes[at + 2] === 4 && bytes[at + 7] === 0) count += 1;
  return count;
}

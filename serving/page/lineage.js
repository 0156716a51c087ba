// Everything behind one answer, for a person to read: what was asked and done, what people said of it, and the model
// that answered, with the run, the code, the data and the feedback that made it.

import { copy } from "./copying.js";
import { byId, counted, icon, iconButton, make, when } from "./dom.js";
import { Refused, lineage, pictureFile } from "./endpoint.js";
import { dataUrl, shown } from "./pictures.js";
import { stepItem } from "./steps.js";

const DIGEST_DIGITS = 12;
const DVC = "dvc.";
const DATA = "dvc.data/";
const REPORTS = "dvc.data/metrics/";
const SCORE = "/score";

/** Wide enough to stand beside the conversation; else it covers it. */
const wide = matchMedia("(min-width: 72rem)");

/** @type {HTMLElement | null} who opened it, and gets the focus back */
let opener = null;

/**
 * Open the panel on one answer.
 *
 * @param {string} completionId
 */
export async function openLineage(completionId) {
  const panel = dialog();
  if (!panel.open) opener = /** @type {HTMLElement | null} */ (document.activeElement);
  // Of this answer alone: what comes late for another one goes where nobody sees it.
  const content = make("div", {}, faint("Looking it up …"));
  byId("lineage-content").replaceChildren(content);
  reveal();
  try {
    content.replaceChildren(...sections(await lineage(completionId)));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    content.replaceChildren(make("p", { role: "alert" }, error.message));
  }
}

/** @returns {boolean} whether there was something to close */
export function closeLineage() {
  const panel = dialog();
  if (!panel.open) return false;
  panel.close();
  opener?.focus();
  return true;
}

/** Wire the panel up; call once. */
export function prepareLineage() {
  byId("close-lineage").addEventListener("click", closeLineage);
  dialog().addEventListener("cancel", (event) => {
    event.preventDefault();
    closeLineage();
  });
  wide.addEventListener("change", () => {
    if (!dialog().open) return;
    dialog().close();
    reveal();
  });
}

function reveal() {
  const panel = dialog();
  if (!panel.open && wide.matches) panel.show();
  else if (!panel.open) panel.showModal();
  byId("lineage-title").focus();
}

function dialog() {
  return /** @type {HTMLDialogElement} */ (byId("lineage"));
}

/**
 * @param {any} found what the endpoint knows of the completion
 * @returns {HTMLElement[]}
 */
function sections(found) {
  const version = found.version;
  const parts = [asked(found), pictures(found.pictures), steps(found.answer), votes(found.feedback), model(found.model, version)];
  if (version.run_id)
    parts.push(learned(version), data(version.tags ?? {}), scores(version.metrics ?? {}), more(version.tags ?? {}));
  parts.push(source(found));
  return parts.filter((part) => part !== null);
}

/**
 * @param {string} title
 * @param {...(Node | string | null | false)} children
 */
function section(title, ...children) {
  return make("section", {}, make("h3", {}, title), ...children);
}

/** @param {string} text */
function faint(text) {
  return make("p", { class: "faint" }, text);
}

/**
 * @param {[string, Node | string | null | undefined][]} rows those without a value are left out
 */
function facts(rows) {
  const kept = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make("dl", {}, ...kept.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

/**
 * A digest or an id: its first digits, all of them on hovering and on copying.
 *
 * @param {string} text
 * @param {number} [digits]
 */
function digest(text, digits = DIGEST_DIGITS) {
  const whole = text.replace(/\.dir$/, "");
  const short = make("code", { title: whole }, whole.slice(0, digits));
  return make(
    "span",
    { class: "digest" },
    short,
    iconButton(`Copy ${whole}`, "copy", () => copy(whole)),
  );
}

/** @param {any} found */
function asked({ id, created, request, answer }) {
  const question = request.messages.findLast((/** @type {any} */ message) => message.role === "user");
  const text = words(question?.content ?? "");
  const written = answer
    ? `${answer.prompt_tokens} read, ${answer.completion_tokens} written, in ${answer.seconds.toFixed(2)} s`
    : "not on record: still being written, or its server was killed";
  return section(
    "Answer",
    facts([
      ["Asked", text],
      ["Answered", answer?.content],
      ["When", when(created)],
      ["Tokens", written],
      ["Ended", answer && ending(answer.finish_reason)],
      ["Id", digest(id, 18)],
    ]),
  );
}

/**
 * @param {string | any[]} content
 * @returns {string} its text, without pictures and clips
 */
function words(content) {
  return typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");
}

/** @param {any[]} items of the request */
function pictures(items) {
  if (!items?.length) return null;
  const list = make("ul", { class: "plain-list pictures" }, ...items.map(picture));
  return section(items.length === 1 ? "Picture" : "Pictures", list);
}

/** @param {any} item */
function picture({ digest: name, width, height, path }) {
  const place = make("div", {}, faint("Looking it up …"));
  const size = `${width} × ${height}`;
  pictureFile(path)
    .then(dataUrl)
    .then((url) => place.replaceChildren(shown({ kind: "image", url, name: `Picture of the question, ${size}` })))
    .catch((error) => {
      if (!(error instanceof Refused)) throw error;
      place.replaceChildren(faint(error.message));
    });
  return make("li", {}, place, make("p", { class: "faint" }, `${size} `, digest(name)));
}

/** @param {string} reason */
function ending(reason) {
  if (reason === "length") return "cut at the limit of tokens";
  return reason === "stop" ? "finished" : reason;
}

/** @param {any} answer */
function steps(answer) {
  if (!answer?.steps.length) return null;
  return section("Steps", make("ol", { class: "steps" }, ...answer.steps.map(stepItem)));
}

/** @param {any[]} items oldest first */
function votes(items) {
  if (!items.length) return section("Feedback", faint("Nobody has said anything about this answer."));
  return section("Feedback", make("ul", { class: "plain-list" }, ...items.map(vote)));
}

/** @param {any} item */
function vote(item) {
  const replaced = item.replaced_by ? " (replaced by a later one)" : "";
  return make(
    "li",
    { class: replaced ? "replaced" : null },
    make(
      "p",
      {},
      icon(item.rating),
      ` ${item.rating === "up" ? "Good" : "Bad"}, ${when(item.created)}${replaced} `,
      digest(item.id, 11),
    ),
    item.correction && make("blockquote", {}, item.correction),
    item.comment && make("blockquote", {}, item.comment),
  );
}

/**
 * @param {string} name `NAME/VERSION`
 * @param {any} version
 */
function model(name, version) {
  if (!version.run_id) return section("Model", facts([["Version", name]]), faint("This registry does not hold it."));
  const tags = version.tags ?? {};
  const commit = tags.git_commit && tags.git_commit !== "none" ? digest(tags.git_commit) : null;
  if (commit && tags.git_dirty === "true") commit.append(" with changes on top");
  return section(
    "Model",
    facts([
      ["Version", name],
      ["Is now", version.aliases?.join(", ")],
      ["Registered", version.created && when(version.created)],
      ["Run", digest(version.run_id)],
      ["Commit", commit],
      ["Weights", tags.model_digest && digest(tags.model_digest)],
      ["Gate", tags.gate && `${tags.gate}: ${tags.gate_reason}`],
      ["Bento", tags.bento],
    ]),
  );
}

/** @param {any} version */
function learned(version) {
  const chain = version.taught_by ?? [];
  const taught = chain.filter((/** @type {any} */ one) => one.feedback.length);
  if (!taught.length) return section("Learned from people", faint("No feedback is in this version."));
  return section("Learned from people", ...taught.map(lessons));
}

/** @param {{version: string, feedback: string[]}} one */
function lessons({ version, feedback }) {
  return make(
    "details",
    { class: "fold" },
    make("summary", {}, `${version}: ${counted(feedback.length, "feedback item")}`),
    make("ul", { class: "plain-list" }, ...feedback.map((id) => make("li", {}, digest(id, 16)))),
  );
}

/** @param {Record<string, string>} tags */
function data(tags) {
  const names = Object.keys(tags)
    .filter((name) => name.startsWith(DATA) && !name.startsWith(REPORTS))
    .sort();
  if (!names.length) return null;
  return section("Data versions", digests(tags, names));
}

/**
 * @param {Record<string, string>} tags
 * @param {string[]} names
 */
function digests(tags, names) {
  const rows = names.map((name) => [make("code", {}, name.slice(DVC.length)), digest(tags[name], 8)]);
  return table("File or folder", "Digest", rows);
}

/**
 * @param {string} subject
 * @param {string} value
 * @param {(Node | string)[][]} rows each of a name and its value
 */
function table(subject, value, rows) {
  const heads = [subject, value].map((name) => make("th", { scope: "col" }, name));
  const lines = rows.map(([name, said]) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, said)));
  return make("table", {}, make("thead", { class: "unseen" }, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
}

/** @param {Record<string, number>} metrics */
function scores(metrics) {
  const suites = Object.keys(metrics)
    .filter((name) => name.endsWith(SCORE))
    .sort();
  if (!suites.length) return null;
  const rows = suites.map((name) => [name.slice(0, -SCORE.length).replaceAll("_", " "), meter(metrics[name])]);
  const about = "Share of questions answered rightly that it was never trained on.";
  return section("Held-out scores", faint(about), table("Suite", "Score", rows));
}

/** @param {number} score from 0 to 1 */
function meter(score) {
  const bar = make("meter", { min: "0", max: "1", value: String(score), "aria-hidden": "true" });
  return make("span", { class: "score" }, bar, score.toFixed(3));
}

/**
 * What few will want to read, folded.
 *
 * @param {Record<string, string>} tags
 */
function more(tags) {
  const code = Object.keys(tags)
    .filter((name) => name.startsWith(DVC) && !name.startsWith(DATA))
    .sort();
  const folds = [
    code.length > 0 && fold("Code versions", digests(tags, code)),
    tags.validation && fold("Checks of the data", json(tags.validation)),
    tags.params && fold("Parameters", json(tags.params)),
  ].filter((part) => part);
  return folds.length ? section("More", ...folds) : null;
}

/** @param {any} found */
function source(found) {
  const command = `loopwright trace ${found.id}`;
  return section(
    "In a terminal",
    make(
      "p",
      { class: "command" },
      make("code", {}, command),
      iconButton("Copy command", "copy", () => copy(command)),
    ),
    fold("All of it as JSON", json(JSON.stringify(found))),
  );
}

/**
 * @param {string} title
 * @param {HTMLElement} content
 */
function fold(title, content) {
  return make("details", { class: "fold" }, make("summary", {}, title), content);
}

/** @param {string} text */
function json(text) {
  return make(
    "pre",
    { tabindex: "0", role: "group", "aria-label": "JSON" },
    make("code", {}, JSON.stringify(JSON.parse(text), null, 2)),
  );
}

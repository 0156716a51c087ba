// The registry's page: which model is champion and why, what ran and what runs next, what feedback waits. Read-only.

import { askForKey } from "./api-key.js";
import { copy } from "./copying.js";
import { byId, counted, make, when } from "./dom.js";
import { Refused, modelCard, overview } from "./endpoint.js";
import { show } from "./markdown.js";
import { switchTheme } from "./theme.js";

const LOOPBACK = ["localhost", "127.0.0.1", "[::1]"];
/** States of Prefect's that ask for attention. */
const BAD = ["Failed", "Crashed", "Refused", "TimedOut", "Late"];

/** Loads begun: an answer that a later load overtook is not shown. */
let loads = 0;

/** Read everything anew and show it. */
async function load() {
  const state = byId("state");
  const turn = (loads += 1);
  state.textContent = "Looking it up …";
  try {
    const answer = await overview();
    if (turn !== loads) return;
    fill(answer);
    state.textContent = `As of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (turn !== loads) return;
    state.textContent = error.message;
    if (error.status === 401 && (await askForKey())) await load();
  }
}

/** @param {any} found */
function fill({ models, served, runs, successes, feedback, drift, links }) {
  const empty = served.length ? `No registry here; served: ${served.join(", ")}.` : "Nothing is registered yet.";
  put("models", ...(models.length ? models.map(model) : [faint(empty)]));
  put("runs", runs ? rows(runs.recent, run) : lastSuccesses(successes));
  put("next", runs ? rows(runs.scheduled, scheduled) : faint("Schedules run while “loopwright up” runs."));
  put("feedback", votes(feedback));
  put("drift", drift ? markdown(`Checked on ${drift.date}\n\n${drift.report.replace(/^# .*\n/, "")}`) : faint("No check yet; the flow “monitor” runs daily."));
  byId("content").hidden = false;
  put("links", make("ul", { class: "links" }, ...links.map((/** @type {any} */ { name, url }) => make("li", {}, link(name, url)))));
}

/**
 * @param {string} id
 * @param {...Node} nodes
 */
function put(id, ...nodes) {
  byId(id).replaceChildren(...nodes);
}

/** @param {string} text */
function faint(text) {
  return make("p", { class: "faint" }, text);
}

/**
 * A link to another service; to one on the server's own loopback address its address, where this is another machine.
 *
 * @param {string} name
 * @param {string | null} url
 */
function link(name, url) {
  if (!url) return name;
  const isThere = LOOPBACK.includes(new URL(url).hostname) && !LOOPBACK.includes(location.hostname);
  return isThere ? `${name}, on the server: ${url}` : make("a", { href: url, rel: "noreferrer" }, name);
}

/** @param {any} model */
function model({ name, champion, challenger, challenger_share: share, previous, versions }) {
  const heading = make("h3", {}, name);
  const about = champion
    ? [fact("Champion", champion), ...(previous ? [fact("Before it", previous)] : [])]
    : [faint("No champion: the first version that passes the gate becomes it.")];
  if (challenger) about.push(fact("Challenger", challenger, `answers ${Math.round(share * 100)} % of the users`));
  const others = make(
    "details",
    {},
    make("summary", {}, versions.length === 1 ? "One version" : `The newest ${versions.length} versions`),
    make("ul", { class: "versions" }, ...versions.map(version)),
  );
  return make("article", { "aria-label": name }, heading, ...about, others);
}

/**
 * @param {string} role
 * @param {any} version
 * @param {string} [more]
 */
function fact(role, version, more) {
  const score = version.score === null ? "" : `, score ${version.score.toFixed(3)}`;
  return make(
    "div",
    { class: "fact" },
    make("p", {}, make("span", { class: "role" }, role), " ", make("strong", {}, link(version.model, version.url)), `${score}${more ? `, ${more}` : ""}`),
    version.reason && make("p", { class: "reason" }, version.reason),
    cardOf(version),
  );
}

/** @param {any} version */
function version(version) {
  const state = [...version.aliases, version.rolled_back ? "rolled back" : version.gate].filter(Boolean).join(", ");
  const score = version.score === null ? "" : version.score.toFixed(3);
  return make(
    "li",
    {},
    make("p", {}, make("strong", {}, link(version.model, version.url)), ` ${[state, score, when(version.created)].filter(Boolean).join(" · ")}`),
    cardOf(version),
  );
}

/** @param {any} version with a fold that fetches its card when it is opened */
function cardOf({ model: name }) {
  const content = make("div", { class: "words" }, faint("Looking it up …"));
  const opened = async () => {
    if (!fold.open || content.dataset.read) return;
    content.dataset.read = "yes";
    try {
      const { card } = await modelCard(name);
      content.replaceChildren(card ? markdown(card) : faint("An earlier release registered it, without a card."));
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      delete content.dataset.read;
      content.replaceChildren(make("p", { role: "alert" }, error.message));
    }
  };
  const fold = make("details", { toggle: opened }, make("summary", {}, `Model card of ${name}`), content);
  return fold;
}

/** @param {string} text */
function markdown(text) {
  const element = make("div", { class: "words" });
  show(element, text, copy);
  return element;
}

/**
 * @param {any[]} items
 * @param {(item: any) => HTMLElement} row
 */
function rows(items, row) {
  return items.length ? make("ul", { class: "rows" }, ...items.map(row)) : faint("None.");
}

/** @param {any} run of Prefect */
function run({ flow, name, state, message, time, url }) {
  const mark = make("span", { class: BAD.includes(state) ? "bad" : "good" }, state);
  return make("li", {}, make("p", {}, link(flow, url), " ", mark, ` ${moment(time)} `, make("span", { class: "faint" }, name)), message && make("p", { class: "reason" }, message));
}

/** @param {any} run of Prefect */
function scheduled({ flow, time, url }) {
  return make("li", {}, make("p", {}, link(flow, url), ` ${moment(time)}`));
}

/** @param {string | null} iso */
function moment(iso) {
  return iso ? when(Date.parse(iso) / 1000) : "";
}

/** @param {Record<string, number>} successes by flow, in seconds since the epoch */
function lastSuccesses(successes) {
  const items = Object.entries(successes);
  if (!items.length) return faint("No scheduled flow has run yet.");
  const lines = items.map(([name, seconds]) => make("li", {}, make("p", {}, `${name} last succeeded ${when(seconds)}`)));
  return make("ul", { class: "rows" }, ...lines);
}

/** @param {any} feedback */
function votes(feedback) {
  const last = feedback.last_improvement;
  const lines = [
    `${counted(feedback.to_ingest, "vote")} to ingest, ${counted(feedback.to_train_on, "item")} to train on`,
    `${counted(feedback.votes, "vote")} in all, ${counted(feedback.corrections, "correction")}; ${feedback.quarantined} quarantined`,
    last ? `Last improvement: ${last.candidate} ${last.outcome}, ${when(last.created)}. ${last.reason}` : "No improvement yet",
  ];
  return make("ul", { class: "rows" }, ...lines.map((line) => make("li", {}, make("p", {}, line))));
}

byId("reload").addEventListener("click", load);
byId("switch-theme").addEventListener("click", switchTheme);
await load();

// Conversations as a file, and back: a file is a stranger's until every part of it is checked. Knows no DOM and no storage.

import { checkedSettings } from "./sampling.js";
import { newId, STATUSES, titleOf } from "./tree.js";

const FORMAT = "torchchat conversations";
const VERSION = 1;
const LIMITS = { conversations: 10_000, messages: 20_000, text: 8_000_000 };
export const MAX_FILE = 256_000_000;

/** The text of a file with these conversations. */
export function write(conversations) {
  const plain = conversations.map(({ id, title, named, created, updated, system, settings, nodes, chosen }) => ({
    id,
    title,
    named,
    created,
    updated,
    system,
    settings,
    nodes,
    chosen,
  }));
  return `${JSON.stringify({ format: FORMAT, version: VERSION, conversations: plain }, null, 1)}\n`;
}

/** The conversations in a file's text. Throws an Error whose message a person can read. */
export function read(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch (error) {
    throw new Error("This file is no JSON, so it is no export of conversations.", { cause: error });
  }
  if (!isObject(file) || file.format !== FORMAT) throw new Error("This file is no export of conversations.");
  if (file.version !== VERSION)
    throw new Error(`This file is of version ${shown(file.version)}; this page reads version ${VERSION}.`);
  if (!Array.isArray(file.conversations) || file.conversations.length > LIMITS.conversations) {
    throw new Error("This file has no list of conversations, or one that is too long.");
  }
  return file.conversations.map((one, index) => {
    try {
      return conversation(one);
    } catch (error) {
      throw new Error(`Nothing was imported: conversation ${index + 1} of this file is damaged (${error.message}).`, {
        cause: error,
      });
    }
  });
}

/** Those of `read` that are new here, with ids that are free, and how many were here already. */
export function unknown(imported, have) {
  const fresh = [];
  for (const one of imported) {
    const same = have.get(one.id);
    if (same && same.updated === one.updated && same.nodes.length === one.nodes.length) continue;
    fresh.push(same ? { ...one, id: newId() } : one);
  }
  return { fresh, known: imported.length - fresh.length };
}

function conversation(one) {
  if (!isObject(one)) throw new Error("it is no object");
  const nodes = messages(one.nodes);
  const parents = new Map(nodes.map((node) => [node.id, node.parent]));
  const chosen = Array.isArray(one.chosen) ? one.chosen : fail("it does not say which branches are seen");
  for (const pair of chosen) {
    const good = Array.isArray(pair) && pair.length === 2 && parents.has(pair[1]) && parents.get(pair[1]) === pair[0];
    if (!good) throw new Error("a branch that is seen does not exist");
  }
  const first = nodes.find((node) => node.role === "user");
  return {
    id: id(one.id),
    title: string(one.title, "title", 1000) || titleOf(first ? first.content : "") || "Untitled",
    named: one.named === true,
    created: time(one.created),
    updated: time(one.updated),
    system: string(one.system, "system text"),
    settings: checkedSettings(one.settings),
    nodes,
    chosen: [...new Map(chosen)],
  };
}

function messages(nodes) {
  if (!Array.isArray(nodes) || nodes.length > LIMITS.messages)
    throw new Error("it has no list of messages, or one that is too long");
  const seen = new Set();
  return nodes.map((node) => {
    if (!isObject(node)) throw new Error("a message is no object");
    if (node.parent !== null && !seen.has(node.parent)) throw new Error("a message answers one that is not before it");
    if (node.role !== "user" && node.role !== "assistant")
      throw new Error(`a message has the role ${shown(node.role)}`);
    if (!STATUSES.includes(node.status)) throw new Error(`a message has the status ${shown(node.status)}`);
    const made = {
      id: id(node.id),
      parent: node.parent,
      role: node.role,
      content: string(node.content, "message"),
      created: time(node.created),
      status: node.status === "open" ? "stopped" : node.status,
      problem: node.problem === null ? null : string(node.problem, "problem", 2000),
      figures: node.figures === null ? null : figures(node.figures),
    };
    if (seen.has(made.id)) throw new Error("two messages have the same id");
    seen.add(made.id);
    return made;
  });
}

const FIGURES = ["tokens", "prompt", "cached", "firstToken", "rate", "context", "leftOut"];

function figures(given) {
  if (!isObject(given)) throw new Error("the figures of a message are no object");
  const made = { about: given.about === true };
  for (const name of FIGURES) {
    const value = given[name];
    if (value === null || value === undefined) continue;
    if (typeof value !== "number" || !Number.isFinite(value) || value < 0)
      throw new Error(`the figure "${name}" is no number`);
    made[name] = value;
  }
  return made;
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const shown = (value) => String(JSON.stringify(value)).slice(0, 40);

function fail(message) {
  throw new Error(message);
}

function id(value) {
  return typeof value === "string" && /^[A-Za-z0-9-]{1,64}$/u.test(value) ? value : fail("an id is missing or odd");
}

function string(value, what, limit = LIMITS.text) {
  return typeof value === "string" && value.length <= limit ? value : fail(`a ${what} is missing or too long`);
}

function time(value) {
  return typeof value === "number" && value >= 0 && value <= 8.64e15 ? value : fail("a time is missing or odd");
}

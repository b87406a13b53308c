// A conversation as a tree of messages: every edit and every new answer is a branch, and nothing is overwritten. Pure data.
//
// conversation: {id, title, named, created, updated, system, settings, nodes, chosen}
//   named: a person gave the title; settings: what differs from the server's sampling defaults;
//   nodes: [{id, parent, role, content, created, status, problem, figures}], parents before children; parent null: a beginning;
//   chosen: [[parent or null, child]], the branch last looked at.

export const STATUSES = ["done", "stopped", "length", "failed", "open"];
/** Of an answer: complete, stopped by a person, cut at its length, failed, or still being made (or cut off by a reload). */

export function newId() {
  const words = crypto.getRandomValues(new Uint32Array(3)); // randomUUID is only for https and this machine
  return Array.from(words, (word) => word.toString(16).padStart(8, "0")).join("");
}

export function newConversation() {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    named: false,
    created: now,
    updated: now,
    system: "",
    settings: {},
    nodes: [],
    chosen: [],
  };
}

/** Adds a message behind `parent` (an id, or null) and goes to it. */
export function addMessage(conversation, parent, role, content, status = "done") {
  const node = { id: newId(), parent, role, content, created: Date.now(), status, problem: null, figures: null };
  conversation.nodes.push(node);
  choose(conversation, node);
  conversation.updated = node.created;
  if (role === "user" && !conversation.named && !conversation.title) conversation.title = titleOf(content);
  return node;
}

export function find(conversation, id) {
  return conversation.nodes.find((node) => node.id === id) ?? null;
}

/** All messages with the same parent, oldest first. */
export function siblings(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent);
}

/** Makes this message the one that is seen after its parent. */
export function choose(conversation, node) {
  conversation.chosen = conversation.chosen.filter(([parent]) => parent !== node.parent);
  conversation.chosen.push([node.parent, node.id]);
}

/** The messages that are seen, first to last. */
export function path(conversation) {
  const children = new Map();
  for (const node of conversation.nodes) {
    if (!children.has(node.parent)) children.set(node.parent, []);
    children.get(node.parent).push(node);
  }
  const chosen = new Map(conversation.chosen);
  const seen = [];
  for (let parent = null; children.has(parent);) {
    const here = children.get(parent);
    const node = here.find((child) => child.id === chosen.get(parent)) ?? here[here.length - 1];
    seen.push(node);
    parent = node.id;
  }
  return seen;
}

/** What is sent for an answer behind the message `last`: the system text, and all up to it. Where an answer is missing, the
 * two messages around it become one: models know only conversations in which one speaks after the other. */
export function messagesUpTo(conversation, last) {
  const messages = [];
  for (let node = last; node !== null; node = find(conversation, node.parent)) {
    if (!node.content) continue;
    if (messages[0]?.role === node.role) messages[0].content = `${node.content}\n\n${messages[0].content}`;
    else messages.unshift({ role: node.role, content: node.content });
  }
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  return [...system, ...messages];
}

/** The first words of a message. */
export function titleOf(content, limit = 60) {
  const line = content.replace(/\s+/gu, " ").trim();
  if (line.length <= limit) return line;
  const cut = line.slice(0, limit);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), limit / 2)).trimEnd()}…`;
}

/** One conversation out of two versions of it, as two tabs may have made them: no message of either is lost. */
export function merge(ours, stored) {
  if (!stored) return ours;
  const here = new Set(ours.nodes.map((node) => node.id));
  const missing = stored.nodes.filter((node) => !here.has(node.id));
  if (missing.length) ours.nodes = [...ours.nodes, ...missing].sort((a, b) => a.created - b.created);
  return ours;
}

/** Where words are found: null, or a piece of text around the place as [before, match, after]. */
export function search(conversation, words) {
  const wanted = words.trim().toLowerCase();
  if (!wanted) return null;
  for (const text of [conversation.title, ...conversation.nodes.map((node) => node.content)]) {
    const at = text.toLowerCase().indexOf(wanted);
    if (at >= 0) {
      const before = text.slice(Math.max(0, at - 24), at);
      const after = text.slice(at + wanted.length, at + wanted.length + 60);
      return [(at > 24 ? "…" : "") + before, text.slice(at, at + wanted.length), after];
    }
  }
  return null;
}

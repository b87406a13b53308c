// The page: which conversation is seen, what happens when a person does something. Everything that is shown is told from here.

import { Answer } from "./answer.js";
import { customization, key, Problem } from "./api.js";
import { switchTheme } from "./colours.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { ask } from "./dialogs.js";
import { announce, byId, counted, notice, saveFile } from "./dom.js";
import { fitting } from "./fit.js";
import { listenForKeys } from "./keys.js";
import { ModelView } from "./model.js";
import { Sheet } from "./sheet.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import * as transfer from "./transfer.js";
import { addMessage, choose, find, messagesUpTo, newConversation, path, titleOf } from "./tree.js";

const conversations = new Map(); // id -> conversation
const running = new Map(); // id -> the Answer that is being made there
let current = newConversation(); // kept from its first message on

const model = new ModelView();
const connection = new Connection(readModel);
const sidebar = new Sidebar({ select: (id) => select(conversations.get(id)) });
const sheet = new Sheet((conversation) => {
  if (conversations.has(conversation.id)) keep(conversation);
});
const composer = new Composer({
  send,
  stop: () => running.get(current.id)?.stop(),
  editLast: () => lastOf("user")?.edit(),
});
const thread = new Thread({ regenerate, edit, retry, go, model: () => model.facts });

/** Answers that were begun: the text so far is written down, even while the page is being closed. */
window.addEventListener("pagehide", () => {
  for (const answer of running.values()) answer.keep();
});

function show() {
  const answer = running.get(current.id) ?? null;
  const name = current.title || "New conversation";
  const kept = conversations.has(current.id);
  byId("title").textContent = name;
  document.title = kept ? `${name} · torchchat` : "torchchat";
  for (const id of ["rename", "export", "delete"]) byId(id).hidden = !kept;
  byId("export-all").disabled = conversations.size === 0;
  byId("welcome").hidden = current.nodes.length > 0;
  const within = byId("messages").contains(document.activeElement);
  thread.show(current, answer?.node ?? null);
  if (within && !byId("messages").contains(document.activeElement)) composer.focus(); // what had the focus is gone
  composer.answering(answer !== null);
  sidebar.show([...conversations.values()], current.id, running);
}

function select(conversation, focus = true) {
  if (!conversation) return;
  current = conversation;
  const hash = conversations.has(current.id) ? `#${current.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname);
  composer.open(hash);
  show();
  const last = path(current).findLast((node) => node.figures?.rate);
  model.reached(last?.figures.rate ?? null);
  if (focus) composer.focus();
}

function begin() {
  select(newConversation());
  sidebar.close();
  composer.focus();
}

async function keep(conversation) {
  try {
    await store.save(conversation);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    notice("This browser's storage is full, so that what is new is not kept: export conversations, and delete some.");
  }
}

function send(text) {
  const last = path(current).at(-1) ?? null;
  conversations.set(current.id, current);
  composer.open(`#${current.id}`);
  if (location.hash !== `#${current.id}`) history.replaceState(null, "", `#${current.id}`);
  answerTo(current, addMessage(current, last?.id ?? null, "user", text));
  thread.toEnd();
}

function answerTo(conversation, message) {
  run(conversation, addMessage(conversation, message.id, "assistant", "", "open"));
}

/** Another answer to the same message, beside the one that is there. */
function regenerate(node) {
  if (!busy()) answerTo(current, find(current, node.parent));
}

/** Another message in the place of this one: a branch. */
function edit(node, text) {
  if (!busy()) answerTo(current, addMessage(current, node.parent, "user", text));
}

/** The same once more, after it failed; what it had got to stays as a branch. */
function retry(node) {
  if (busy()) return;
  if (node.content) regenerate(node);
  else run(current, Object.assign(node, { status: "open", problem: null, figures: null }));
}

function go(node, tool) {
  if (!node || busy()) return;
  choose(current, node);
  keep(current);
  show();
  thread.view(node).focusTool(tool);
}

function busy() {
  const answering = running.has(current.id);
  if (answering) announce("An answer is being made here: stop it first");
  return answering;
}

async function run(conversation, node) {
  const answer = new Answer(node, () => {
    if (conversation === current) thread.grow(node);
  });
  running.set(conversation.id, answer);
  keep(conversation);
  show();
  announce("Answering");
  const problem = await answer.run(async (signal) => {
    const { settings } = conversation;
    const all = messagesUpTo(conversation, find(conversation, node.parent));
    const longest = settings.max_tokens ?? model.facts?.defaults.max_tokens ?? null;
    const { messages, leftOut } = await fitting(all, model.facts?.contextLength, longest, signal);
    return { body: { messages, ...settings }, leftOut };
  });
  running.delete(conversation.id);
  conversation.updated = Date.now();
  if (conversations.has(conversation.id)) await keep(conversation);
  answer.forget();
  show();
  if (conversation === current && node.figures?.rate) model.reached(node.figures.rate);
  announce(problem ? problem.message : ended(node), problem !== null);
  if (answer.model && answer.model !== model.facts?.model) readModel(); // the server was started anew with another one
  if (problem?.kind === "gone") connection.lost();
  if (problem?.kind === "key" && (await askForKey(problem.message)) && conversation === current) retry(node);
}

function ended(node) {
  const words = node.content.split(/\s+/u).filter(Boolean).length;
  return `${node.status === "stopped" ? "Stopped" : "The answer is complete"}, ${counted(words, "word")}`;
}

async function readModel() {
  try {
    model.show(await customization());
    show(); // figures name the context's length
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.kind === "gone") connection.lost();
    else if (error.kind === "key" && (await askForKey(error.message))) await readModel();
    else notice(error.message);
  }
}

async function askForKey(why) {
  const answer = await ask({
    title: "API key",
    text: `${why} It is the one that the server was started with (--api-key).`,
    yes: "Use this key",
    field: { label: "API key", value: "", secret: true },
    option: "Remember it in this browser",
  });
  if (answer) key.set(answer.text, answer.checked);
  return answer !== null;
}

async function rename() {
  const answer = await ask({ title: "Rename", yes: "Rename", field: { label: "Title", value: current.title } });
  if (!answer) return;
  Object.assign(current, { title: titleOf(answer.text, 200), named: true });
  keep(current);
  show();
}

async function remove() {
  const doomed = current;
  const answer = await ask({
    title: "Delete this conversation?",
    text: `“${doomed.title}” and its ${counted(doomed.nodes.length, "message")} are gone for good.`,
    yes: "Delete",
    danger: true,
  });
  if (!answer) return;
  running.get(doomed.id)?.stop();
  conversations.delete(doomed.id);
  await store.remove(doomed.id);
  begin();
  announce("Deleted");
  sidebar.focusCurrent();
}

function exportAs(name, which) {
  saveFile(`torchchat-${name}-${new Date().toISOString().slice(0, 10)}.json`, transfer.write(which));
}

async function importFile(file) {
  try {
    if (file.size > transfer.MAX_FILE) throw new Error("This file is too large to be an export of conversations.");
    const { fresh, known } = transfer.unknown(transfer.read(await file.text()), conversations);
    for (const conversation of fresh) {
      conversations.set(conversation.id, conversation);
      await keep(conversation);
    }
    const already = known ? `; ${counted(known, "one was", "were")} here already` : "";
    if (fresh.length) select(fresh[0]);
    await ask({ title: "Imported", text: `${counted(fresh.length, "conversation")} came in${already}.`, yes: "Good" });
  } catch (error) {
    if (!error.message) throw error;
    await ask({ title: "Nothing was imported", text: error.message, yes: "Close" });
  }
}

function lastOf(role) {
  const node = path(current).findLast((one) => one.role === role);
  return node ? thread.view(node) : null;
}

const pressLast = (role, tool) => () => lastOf(role)?.element.querySelector(`[data-tool="${tool}"]`)?.click();
const press = (id) => () => byId(id).click();

function listen() {
  const clicks = {
    new: begin,
    rename,
    delete: remove,
    export: () => exportAs("conversation", [current]),
    "export-all": () => exportAs("conversations", [...conversations.values()]),
    import: () => byId("import-file").click(),
    theme: switchTheme,
    "notice-close": () => {
      byId("notice").hidden = true;
      composer.focus();
    },
    settings: () => sheet.open(current, model.facts?.defaults ?? {}),
  };
  for (const [id, handler] of Object.entries(clicks)) byId(id).addEventListener("click", handler);
  byId("import-file").addEventListener("change", async ({ target }) => {
    const [file] = target.files;
    if (file) await importFile(file);
    target.value = ""; // so that the same file may be chosen again
  });
  listenForKeys([
    ["/", "goes to the message box", () => composer.focus()],
    ["n", "a new conversation", begin],
    ["f", "searches the conversations", () => sidebar.focusSearch()],
    ["e", "edits the last message", () => lastOf("user")?.edit()],
    ["r", "makes another answer", pressLast("assistant", "regenerate")],
    ["c", "copies the last answer", pressLast("assistant", "copy")],
    ["[", "the answer before", pressLast("assistant", "previous")],
    ["]", "the answer after", pressLast("assistant", "next")],
    [",", "instructions and sampling", press("settings")],
    ["m", "the model and how it runs", () => model.toggle()],
    ["t", "light, dark, or as the system has it", switchTheme],
  ]);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented && !document.querySelector("dialog[open]")) composer.escape();
  });
  window.addEventListener("popstate", () => select(conversations.get(location.hash.slice(1)) ?? newConversation()));
  store.onChange((id, conversation) => {
    if (running.has(id)) return; // what is made here is newer
    if (conversation) conversations.set(id, conversation);
    else conversations.delete(id);
    if (id === current.id) current = conversation ?? newConversation();
    show();
  });
}

async function start() {
  listen();
  const kept = await store.open();
  for (const conversation of kept ?? []) conversations.set(conversation.id, conversation);
  select(conversations.get(location.hash.slice(1)) ?? current, false);
  composer.focus();
  if (!kept)
    notice("This browser keeps nothing here: conversations are lost when the page is closed. Export what matters.");
  await readModel();
}

start();

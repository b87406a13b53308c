// Where conversations are kept: IndexedDB, and while an answer is made a note of it in localStorage, which is written even in
// the moment that a page is closed. Tabs tell each other what they saved. Knows nothing of what is shown.

import { lasting, passing } from "./small.js";
import { merge, newId } from "./tree.js";

const DATABASE = "torchchat";
const CONVERSATIONS = "conversations";
const PARTIAL = "torchchat.partial.";
const ANOTHER_TAB_MS = 10_000; // an answer noted more recently than this may be in the making in another tab

let database = null; // null: nothing can be kept
const channel = "BroadcastChannel" in window ? new BroadcastChannel(DATABASE) : null;
const tab = passing.get("torchchat.tab") ?? newId(); // the same after a reload
passing.set("torchchat.tab", tab);

/** All conversations that are kept, or null where the browser keeps nothing (some private windows). */
export async function open() {
  if (!("indexedDB" in window)) return null;
  try {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
    database = await settled(request);
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    return null;
  }
  database.onversionchange = () => database.close();
  const kept = await settled(store("readonly").getAll());
  for (const conversation of kept) recover(conversation);
  return kept;
}

/** Keeps a conversation. What another tab added to it is added to it here too. Throws DOMException, when storage is full. */
export async function save(conversation) {
  if (!database) return;
  const objects = store("readwrite");
  merge(conversation, await settled(objects.get(conversation.id)));
  await settled(objects.put(conversation));
  channel?.postMessage({ saved: conversation.id });
}

export async function remove(id) {
  if (database) await settled(store("readwrite").delete(id));
  channel?.postMessage({ removed: id });
}

/** Calls back with (id, conversation or null) when another tab saved or removed one. */
export function onChange(callback) {
  channel?.addEventListener("message", async ({ data }) => {
    if (data.removed) callback(data.removed, null);
    else if (database) callback(data.saved, (await settled(store("readonly").get(data.saved))) ?? null);
  });
}

/** Notes an answer as far as it is made. Cheap: only the answer itself is written. */
export function note(node) {
  lasting.set(PARTIAL + node.id, JSON.stringify({ tab, time: Date.now(), content: node.content }));
}

export function forgetNote(node) {
  lasting.remove(PARTIAL + node.id);
}

/** Answers that were being made when a page was closed become stopped ones, with what there was. */
function recover(conversation) {
  for (const node of conversation.nodes.filter((one) => one.status === "open")) {
    const written = lasting.get(PARTIAL + node.id);
    const partial = written ? JSON.parse(written) : null;
    if (partial && partial.tab !== tab && Date.now() - partial.time < ANOTHER_TAB_MS) continue;
    if (partial && partial.content.length > node.content.length) node.content = partial.content;
    node.status = "stopped";
    save(conversation).then(() => forgetNote(node));
  }
}

function store(mode) {
  return database.transaction(CONVERSATIONS, mode).objectStore(CONVERSATIONS);
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new DOMException("another tab holds an older version"));
  });
}

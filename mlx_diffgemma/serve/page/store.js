// Conversations of this browser, in IndexedDB; in memory where the browser keeps nothing. Several
// tabs may change them: each is told of the others' changes, and none overwrites what it has not
// seen.

import {newId} from "./conversation.js";

const DATABASE = "mlx_diffgemma", STORE = "conversations";
const memory = new Map();
const tabs = "BroadcastChannel" in globalThis ? new BroadcastChannel(DATABASE) : null;
export const stored = new EventTarget(); // tells `change`, with the id, of what other tabs did

tabs?.addEventListener("message", ({data}) => stored.dispatchEvent(new CustomEvent("change", {detail: data})));

const PATIENCE = 3000; // ms; a database that was being made when its page was left may never open
let opened = null;

function database() {
  opened ??= new Promise((resolve) => {
    let asked;
    try {
      asked = indexedDB.open(DATABASE, 1);
    } catch {
      resolve(null);
      return;
    }
    asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, {keyPath: "id"});
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
    setTimeout(() => resolve(null), PATIENCE);
  });
  return opened;
}

function asPromise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// Returns all conversations, the last changed first.
export async function all() {
  const kept = await database();
  const found = kept
    ? await asPromise(kept.transaction(STORE).objectStore(STORE).getAll())
    : structuredClone([...memory.values()]);
  return found.sort((a, b) => b.updated - a.updated);
}

export async function one(id) {
  const kept = await database();
  return kept ? asPromise(kept.transaction(STORE).objectStore(STORE).get(id)) : structuredClone(memory.get(id));
}

// Keeps a conversation. Where another tab has kept a newer version, this one is kept beside it, as
// a copy with an id of its own.
export async function keep(conversation) {
  conversation.updated = Date.now();
  const kept = await database();
  if (!kept) {
    memory.set(conversation.id, structuredClone(conversation));
    return;
  }
  const store = kept.transaction(STORE, "readwrite").objectStore(STORE);
  const before = await asPromise(store.get(conversation.id));
  if (before && before.version !== conversation.version) {
    conversation.id = newId();
    conversation.title = `${conversation.title} (copy)`;
  }
  conversation.version += 1;
  await asPromise(store.put(structuredClone(conversation)));
  tabs?.postMessage(conversation.id);
}

export async function forget(id) {
  const kept = await database();
  if (kept) await asPromise(kept.transaction(STORE, "readwrite").objectStore(STORE).delete(id));
  else memory.delete(id);
  tabs?.postMessage(id);
}

// Conversations and settings in this browser, each conversation under a key of its own: tabs do not overwrite each other's.
//
// A conversation is { id, time, messages }, a message { role, content } and, if it is an answer, a note. A store that is full or
// forbidden keeps nothing and the page goes on.

const PREFIX = "aoji.talk.";

function read(store, key) {
  try {
    return JSON.parse(store.getItem(key));
  } catch {
    return null;
  }
}

function write(store, key, value) {
  try {
    store.setItem(key, JSON.stringify(value));
  } catch (error) {
    console.warn(error);
  }
}

const isText = value => typeof value === "string";

function isTalk(talk) {
  return isText(talk?.id) && Array.isArray(talk.messages) && talk.messages.every(m => isText(m?.role) && isText(m?.content));
}

export const create = () => ({ id: Date.now().toString(36) + Math.random().toString(36).slice(2, 8), time: Date.now(), messages: [] });

export function load(id) {
  const talk = read(localStorage, PREFIX + id);
  return isTalk(talk) ? talk : null;
}

// Keeps a conversation, unless nothing was said or it was removed while its answer ran.
export function save(talk) {
  if (!talk.messages.length || talk.removed) return;
  talk.time = Date.now();
  write(localStorage, PREFIX + talk.id, talk);
}

export function remove(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch (error) {
    console.warn(error);
  }
}

// All conversations, the latest first.
export function list() {
  try {
    const ids = Object.keys(localStorage).filter(key => key.startsWith(PREFIX)).map(key => key.slice(PREFIX.length));
    return ids.map(load).filter(Boolean).sort((a, b) => b.time - a.time);
  } catch {
    return [];
  }
}

export const settings = () => read(localStorage, "aoji.settings") ?? {};
export const keep = values => write(localStorage, "aoji.settings", values);

// A key is forgotten with its tab.
export const key = () => read(sessionStorage, "aoji.key") ?? "";
export const keepKey = value => write(sessionStorage, "aoji.key", value);

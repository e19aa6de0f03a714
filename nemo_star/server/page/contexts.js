// The list of contexts: uploaded, watched while they are encoded, picked, deleted.

import * as api from "./api.js";
import { showContext } from "./progress.js";
import { announce, byId, element, notice, number } from "./dom.js";

const FIRST_WAIT = 150; // milliseconds between two looks at a context that is being encoded ...
const LAST_WAIT = 1000; // ... which become fewer the longer it takes
const MAX_NAME = 200;

const known = new Map(); // by id, as the service described them last
const watched = new Set(); // ids
let selected = null; // an id
let onSelect = () => {};

export function whenSelected(act) {
  onSelect = act;
}

export const current = () => known.get(selected) ?? null;

export const title = (context) => context.name ?? context.id;

/** Ask the service which there are. */
export async function refresh() {
  const { data } = await api.contexts();
  for (const id of known.keys()) if (!data.some((context) => context.id === id)) known.delete(id);
  data.forEach(update);
  if (selected !== null && !known.has(selected)) select(null);
  render();
}

/** Show one; null: the place for new ones. */
export function select(id) {
  selected = id;
  byId("new-view").hidden = id !== null;
  byId("context-view").hidden = id === null;
  render();
  onSelect(current());
}

/** Have a file encoded, and show it. */
export async function upload(file) {
  if (!file.size) return notice(`${file.name} is empty.`);
  announce(`Uploading ${file.name}`);
  byId("uploading").textContent = `Uploading ${file.name} …`;
  byId("uploading").hidden = false;
  try {
    const context = await api.createContext(file, freeName(file.name));
    notice("");
    update(context);
    select(context.id);
    announce(`${title(context)}: ${number(context.tokens)} tokens are being encoded`);
  } catch (error) {
    notice(`${file.name}: ${error.message}`);
  } finally {
    byId("uploading").hidden = true;
  }
}

export async function remove(context) {
  try {
    await api.deleteContext(context.id);
  } catch (error) {
    if (error.status !== 404) return notice(error.message); // gone is gone
  }
  forget(context.id);
  announce(`${title(context)} is deleted`);
}

/** Something new about a context: shown, and looked after until it is ready. */
export function update(context) {
  known.set(context.id, { ...known.get(context.id), ...context });
  if (context.status === "queued" || context.status === "encoding") watch(context.id);
  render();
}

/** A question had its context encoded again. */
export function progressed(id, progress) {
  if (known.has(id)) update({ id, progress });
}

async function watch(id) {
  if (watched.has(id)) return;
  watched.add(id);
  for (let wait = FIRST_WAIT; known.has(id); wait = Math.min(LAST_WAIT, wait * 1.1)) {
    await new Promise((resume) => setTimeout(resume, wait));
    try {
      const context = await api.context(id);
      if (!known.has(id)) break; // deleted meanwhile
      update(context);
      if (context.status === "ready") announce(`${title(context)} is ready: ask`);
      if (context.status === "ready" || context.status === "failed") break;
    } catch (error) {
      if (error.status === 404) forget(id);
      else notice(error.message);
      if (error.status !== 0) break; // else the service may come back
    }
  }
  watched.delete(id);
}

function forget(id) {
  known.delete(id);
  if (selected === id) select(null);
  render();
}

/** A name that no other context has. */
function freeName(name) {
  const taken = new Set([...known.values()].map(title));
  const base = name.slice(0, MAX_NAME - 10);
  for (let count = 1; ; count++) {
    const tried = count === 1 ? base : `${base} (${count})`;
    if (!taken.has(tried)) return tried;
  }
}

function render() {
  const list = byId("contexts");
  const items = new Map([...list.children].map((item) => [item.dataset.id, item]));
  for (const [id, item] of items) if (!known.has(id)) item.remove();
  for (const context of known.values()) {
    const item = items.get(context.id) ?? list.appendChild(newItem(context));
    const [button] = item.children;
    button.setAttribute("aria-current", String(context.id === selected));
    button.lastChild.textContent = `${number(context.tokens)} tokens${stateOf(context)}`;
  }
  byId("no-contexts").hidden = known.size > 0;
  if (current()) showContext(current(), title(current()));
}

function newItem(context) {
  const name = element("span", { class: "name" }, title(context));
  const button = element("button", { type: "button", class: "pick" }, name, element("span", { class: "note" }));
  button.addEventListener("click", () => select(context.id));
  const item = element("li", {}, button);
  item.dataset.id = context.id;
  return item;
}

function stateOf({ status, progress }) {
  if (status === "ready") return "";
  if (status === "encoding" && progress?.blocks) return ` · ${Math.floor((100 * progress.blocks_done) / progress.blocks)} %`;
  return ` · ${status}`;
}

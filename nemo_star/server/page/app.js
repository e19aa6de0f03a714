// The page of the service: what is clicked, typed and dropped.

import * as api from "./api.js";
import * as contexts from "./contexts.js";
import { Conversation } from "./conversation.js";
import { byId, notice } from "./dom.js";

const conversations = new Map(); // by the context's id; they end with the page

function conversationOf(context) {
  if (!conversations.has(context.id)) {
    const made = new Conversation(context.id, {
      onChange: showConversation,
      onProgress: (progress) => contexts.progressed(context.id, progress),
    });
    conversations.set(context.id, made);
  }
  return conversations.get(context.id);
}

function showConversation() {
  const context = contexts.current();
  if (context === null) return;
  const conversation = conversationOf(context);
  if (byId("conversation").firstChild !== conversation.node) {
    byId("conversation").replaceChildren(conversation.node);
  }
  byId("ask").hidden = conversation.isBusy;
  byId("stop").hidden = !conversation.isBusy;
  byId("start-over").hidden = !conversation.turns.length;
}

function ask() {
  const context = contexts.current();
  const question = byId("question").value.trim();
  if (context === null || !question || conversationOf(context).isBusy) return;
  byId("question").value = "";
  conversationOf(context).ask(question);
  byId("question").focus(); // the button goes
}

async function start() {
  try {
    const { data } = await api.models();
    byId("model").textContent = data[0].id;
    byId("model").hidden = false;
    await contexts.refresh();
    if (!byId("key-form").hidden) byId("main").focus(); // the form goes
    byId("key-form").hidden = true;
    notice("");
  } catch (error) {
    if (error.status !== 401) notice(error.message);
  }
}

function listenToKey() {
  api.whenKeyNeeded((wasGiven) => {
    byId("key-form").hidden = false;
    byId("key-note").textContent = wasGiven ? "This key is not valid here." : "This service asks for a key.";
    byId("key").focus();
  });
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    api.setKey(byId("key").value.trim());
    byId("key").value = "";
    start();
  });
}

async function uploadAll(files) {
  for (const file of files) await contexts.upload(file);
  if (contexts.current()) byId("question").focus();
}

function listenToTexts() {
  byId("file").addEventListener("change", async (event) => {
    await uploadAll([...event.target.files]);
    event.target.value = ""; // the same file may be chosen again
  });
  byId("paste-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = byId("paste").value;
    if (!text.trim()) return byId("paste").focus();
    await uploadAll([new File([text], "Pasted text", { type: "text/plain" })]);
    if (contexts.current()) byId("paste").value = "";
  });
  // Anywhere: a file that misses the frame would replace the page.
  const isFile = (event) => event.dataTransfer.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dragging");
  });
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    document.body.classList.remove("dragging");
    uploadAll([...event.dataTransfer.files]);
  });
}

function listenToContexts() {
  contexts.whenSelected(showConversation);
  byId("new").addEventListener("click", () => {
    contexts.select(null);
    byId("file").focus();
  });
  const dialog = byId("delete-dialog");
  let doomed = null; // the list may change while the question stands
  byId("delete").addEventListener("click", () => {
    doomed = contexts.current();
    byId("delete-title").textContent = `Delete ${contexts.title(doomed)}?`;
    dialog.returnValue = "keep";
    dialog.showModal();
  });
  dialog.addEventListener("close", async () => {
    if (dialog.returnValue !== "delete") return;
    conversations.get(doomed.id)?.stop();
    await contexts.remove(doomed);
    conversations.delete(doomed.id);
    byId("new").focus(); // the button that had the focus is gone
  });
}

function listenToQuestions() {
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", () => {
    conversationOf(contexts.current()).stop();
    byId("question").focus();
  });
  byId("start-over").addEventListener("click", () => {
    conversationOf(contexts.current()).startOver();
    byId("question").focus();
  });
}

listenToKey();
listenToTexts();
listenToContexts();
listenToQuestions();
byId("notice-close").addEventListener("click", () => notice(""));
start();

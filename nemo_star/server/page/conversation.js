// Questions about one context, and their answers as they come.

import * as api from "./api.js";
import { announce, byId, duration, element, plural } from "./dom.js";

const TOO_LONG = ["context_length_exceeded", "query_length_exceeded"];
const NEAR = 160; // pixels: who is so near to the end of the page is taken along

export class Conversation {
  /** `onChange`: an answer has begun or ended; `onProgress`: the context has to be encoded again. */
  constructor(contextId, { onChange, onProgress }) {
    this.node = element("ol", { class: "turns", "aria-label": "Conversation" });
    this.contextId = contextId;
    this.turns = []; // {question, answer}: what is sent along
    this.onChange = onChange;
    this.onProgress = onProgress;
    this.controller = null; // of the answer under way
  }

  get isBusy() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  /** The next question comes without the turns before it. */
  startOver() {
    this.stop();
    if (!this.turns.length) return;
    this.turns = [];
    this.node.append(element("li", { class: "divider" }, "New conversation: the turns above are not sent along"));
    this.onChange();
  }

  async ask(question) {
    const turn = newTurn(question);
    const turns = this.turns;
    this.controller = new AbortController();
    this.onChange();
    keepEndInView(() => this.node.append(turn.node), Infinity);
    const began = performance.now();
    const answer = { text: "", last: {}, firstAfter: null, isFailed: false };
    try {
      const messages = [...turns, { question }].flatMap(messagesOf);
      const body = { context: this.contextId, messages, return_progress: true };
      for await (const chunk of api.chat(body, this.controller.signal)) this.take(chunk, answer, turn, began);
      finish(turn, answer, began, "Answer");
    } catch (error) {
      if (error.name === "AbortError") finish(turn, answer, began, "Stopped");
      else this.fail(turn, error, question);
      answer.isFailed = error.name !== "AbortError";
    }
    if (answer.text && !answer.isFailed) turns.push({ question, answer: answer.text });
    this.controller = null;
    this.onChange();
  }

  take(chunk, answer, turn, began) {
    if (chunk.usage) answer.last = chunk;
    if (chunk.prompt_progress) this.onProgress(chunk.prompt_progress);
    const text = chunk.choices[0]?.delta?.content;
    if (!text) return;
    answer.firstAfter ??= (performance.now() - began) / 1000;
    answer.text += text;
    keepEndInView(() => turn.text.append(text));
  }

  fail(turn, error, question) {
    turn.answer.removeAttribute("aria-busy");
    turn.answer.append(element("p", { class: "error", role: "alert" }, error.message));
    const isTooLong = TOO_LONG.includes(error.code) && this.turns.length > 0;
    const again = element("button", { type: "button" }, isTooLong ? "Ask without the earlier turns" : "Ask again");
    again.addEventListener("click", () => {
      if (this.isBusy) return;
      turn.node.remove();
      if (isTooLong) this.startOver();
      this.ask(question);
      byId("question").focus(); // the button is gone
    });
    keepEndInView(() => turn.answer.append(again));
  }
}

function messagesOf({ question, answer }) {
  const user = { role: "user", content: question };
  return answer === undefined ? [user] : [user, { role: "assistant", content: answer }];
}

function newTurn(question) {
  const text = element("p", { class: "text" });
  const answer = element("div", { class: "answer", "aria-busy": "true" }, heading("Answer"), text);
  const asked = element("div", { class: "question" }, heading("Question"), element("p", { class: "text" }, question));
  return { node: element("li", { class: "turn" }, asked, answer), answer, text };
}

const heading = (text) => element("h3", { class: "visually-hidden" }, text);

function finish(turn, answer, began, word) {
  turn.answer.removeAttribute("aria-busy");
  const values = measured(answer, (performance.now() - began) / 1000);
  if (word === "Stopped") values.unshift(["", "stopped"]);
  const list = element("ul", { class: "measured", "aria-label": "Measured" });
  for (const [name, value] of values) {
    list.append(element("li", {}, ...(name ? [`${name} `] : []), element("strong", {}, value)));
  }
  keepEndInView(() => turn.answer.append(list));
  announce(`${word}: ${answer.text || "no text"}`);
}

/** [name, value] in words; the service's numbers where the answer came to its end. */
function measured({ last: { usage, timings }, firstAfter }, seconds) {
  const values = [];
  const first = timings?.time_to_first_token_seconds ?? firstAfter;
  if (first !== null) values.push(["first token", duration(first)]);
  values.push(["in all", duration(seconds)]);
  if (!usage) return values;
  values.push(["answer", plural(usage.completion_tokens, "token")]);
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  values.push(["prompt", plural(usage.prompt_tokens, "token")], ["cached", plural(cached, "token")]);
  return values;
}

function keepEndInView(change, near = NEAR) {
  const page = document.documentElement;
  const isNear = page.scrollHeight - page.scrollTop - page.clientHeight < near;
  change();
  if (isNear) page.scrollTop = page.scrollHeight;
}

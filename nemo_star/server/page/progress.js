// One context in the main part: what is known of it, and a bar for each context-parallel rank.

import { byId, duration, element, number, plural } from "./dom.js";

const MAX_MARKS = 64; // blocks of a rank; more of them would be too narrow to be told apart

export function showContext(context, name) {
  byId("context-title").textContent = name;
  byId("facts").replaceChildren(...facts(context).map((fact) => element("span", {}, fact)));
  const error = context.error ?? context.warning ?? "";
  byId("context-error").hidden = !error;
  if (byId("context-error").textContent !== error) byId("context-error").textContent = error;
  showRanks(context.progress?.by_cp_rank ?? []);
}

function facts({ status, tokens, progress, cached_tokens: cached, prefill_seconds: seconds, stored }) {
  const found = [plural(tokens, "token")];
  if (status === "queued") found.push("waits for its turn");
  if (status === "failed") found.push("not encoded");
  if (status === "encoding" && progress) {
    found.push(`${number(progress.blocks_done)} of ${plural(progress.blocks, "block")} encoded`);
    found.push(
      progress.seconds_left === null ? duration(progress.seconds) : `about ${duration(progress.seconds_left)} left`,
    );
  }
  if (status === "ready") {
    found.push("ready");
    if (seconds) found.push(`encoded in ${duration(seconds)}`);
    if (cached) found.push(`${number(cached)} of them known before`);
    if (stored === "disk") found.push("kept on disk"); // those in memory may have made room for others meanwhile
  }
  return found;
}

function showRanks(ranks) {
  const place = byId("ranks");
  while (place.children.length > ranks.length) place.lastChild.remove();
  while (place.children.length < ranks.length) place.append(newRank(place.children.length));
  ranks.forEach(({ blocks_done: done, blocks }, rank) => {
    const [, bar, words] = place.children[rank].children;
    bar.setAttribute("aria-valuenow", done);
    bar.setAttribute("aria-valuemax", blocks);
    bar.setAttribute("aria-valuetext", `${number(done)} of ${plural(blocks, "block")}`);
    bar.style.setProperty("--blocks", blocks <= MAX_MARKS ? blocks : 1);
    bar.firstChild.style.width = `${blocks ? (100 * done) / blocks : 100}%`;
    words.textContent = `${number(done)} / ${number(blocks)}`;
  });
}

function newRank(rank) {
  const name = `rank ${rank}`;
  const bar = element(
    "div",
    { class: "bar", role: "progressbar", "aria-label": name, "aria-valuemin": 0, "aria-valuenow": 0 },
    element("div", { class: "fill" }),
  );
  const label = element("span", { class: "note", "aria-hidden": "true" }, name);
  return element("div", { class: "rank" }, label, bar, element("span", { class: "note count", "aria-hidden": "true" }));
}

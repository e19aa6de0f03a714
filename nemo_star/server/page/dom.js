// Small helpers: elements, words for numbers, what screen readers are told.

export const byId = (id) => document.getElementById(id);

/** An element. Texts are text, never HTML: they come from files and from the model. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Say something to those who cannot see it. */
export function announce(text) {
  byId("status").replaceChildren(element("p", {}, text));
}

/** Show what went wrong with something that has no place of its own; "" takes it away. */
export function notice(text) {
  byId("notice").hidden = !text;
  byId("notice-text").textContent = text;
}

export const number = (value) => value.toLocaleString("en");

export const plural = (value, word) => `${number(value)} ${word}${value === 1 ? "" : "s"}`;

/** As long as it is short: 35 ms, 1.4 s, 48 s, 3 min 20 s, 2 h 5 min. */
export function duration(seconds) {
  if (seconds < 0.0995) return `${Math.max(1, Math.round(seconds * 1000))} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(seconds < 0.995 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

// Requests to the service, with the key, and its errors in words.

const KEY = "nemo_star key";

/** What the service refused, or what came between. */
export class ServiceError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Called when a key is asked for; told whether one was given. */
let onKeyNeeded = () => {};

export function whenKeyNeeded(act) {
  onKeyNeeded = act;
}

/** Kept until the tab is closed, and nowhere else. */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function request(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    // Relative, so that a proxy may put the service below a path.
    response = await fetch(`v1/${path}`, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) onKeyNeeded(Boolean(key));
  const body = await response.json().catch(() => ({}));
  throw failure(body.error, response.status);
}

function failure(error, status = 0) {
  const message = error?.message ?? `The service answered with HTTP status ${status}.`;
  const asSentence = message.replace(/^[a-z](?=[a-z]*[ '])/, (letter) => letter.toUpperCase());
  return new ServiceError(asSentence, { status, code: error?.code });
}

const json = async (path, options) => (await request(path, options)).json();

export const models = () => json("models");
export const contexts = () => json("contexts");
export const context = (id) => json(`contexts/${encodeURIComponent(id)}`);
export const deleteContext = (id) => json(`contexts/${encodeURIComponent(id)}`, { method: "DELETE" });

export function createContext(file, name) {
  const form = new FormData();
  form.append("file", file, name);
  form.append("name", name);
  return json("contexts", { method: "POST", body: form });
}

/** Chunks of a streamed answer, to its end; an error within the stream is thrown. */
export async function* chat(body, signal) {
  const response = await request("chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let isWhole = false;
  for await (const line of lines(response.body)) {
    if (!line.startsWith("data: ")) continue; // an empty line, or a sign of life
    const data = line.slice("data: ".length);
    if (data === "[DONE]") {
      isWhole = true; // what is left of the stream is its end, which the service should see taken
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw failure(chunk.error);
    yield chunk;
  }
  if (!isWhole) throw new ServiceError("The connection ended before the answer did.");
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split("\n");
      rest = whole.pop();
      yield* whole;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The connection was lost.");
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed: nothing is left to do
  }
}

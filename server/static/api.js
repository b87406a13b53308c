// The server's API as the page needs it: what runs there, and streamed answers. Every failure becomes one sentence in plain words.

import { lasting, passing } from "./small.js";

const KEY = "torchchat.key";
const PATIENCE_MS = 10_000; // with a server that accepts connections and says nothing

/** What went wrong. kind: "gone" (no server), "key", "busy", "context", "refused" (the request), "failed" (the server). */
export class Problem extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter; // seconds
  }
}

export const key = {
  get: () => passing.get(KEY) ?? lasting.get(KEY) ?? "",
  set(value, remember) {
    key.forget();
    (remember ? lasting : passing).set(KEY, value);
  },
  forget() {
    passing.remove(KEY);
    lasting.remove(KEY);
  },
};

/** What the server runs. Throws a Problem. */
export async function customization() {
  return (await request("/v1/customization")).json();
}

/** How many tokens these messages are, with the beginning of an answer. Throws a Problem. */
export async function countTokens(messages, signal) {
  return (await (await post("/tokenize", { messages }, signal)).json()).count;
}

/** Whether a server is there that takes requests. */
export async function healthy() {
  try {
    return (await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) })).ok;
  } catch (error) {
    if (!(error instanceof TypeError || error.name === "TimeoutError")) throw error;
    return false;
  }
}

/**
 * Streams an answer: calls onText(piece) for each piece and returns {finish, usage, model}, usage null if none was sent.
 * Throws a Problem, or an AbortError when `signal` ended it.
 */
export async function complete(body, signal, onText) {
  const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await post("/v1/chat/completions", streamed, signal);
  let finish = null;
  let usage = null;
  let model = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return { finish, usage, model };
    const chunk = parsed(data);
    if (chunk.error) throw fromError(500, chunk.error);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onText(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
    usage = chunk.usage ?? usage;
    model = chunk.model ?? model;
  }
  throw new Problem("gone", "The connection was lost in the middle of the answer.");
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    throw lost(error, "The server does not answer.");
  }
  if (response.ok) return response;
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch (failure) {
    if (!(failure instanceof SyntaxError || failure instanceof TypeError)) throw failure; // a page of a proxy, say
  }
  throw fromError(response.status, error, Number(response.headers.get("Retry-After")) || null);
}

/** The data of each event of a stream, as text/event-stream defines them. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw lost(error, "The connection was lost in the middle of the answer.");
      });
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/u);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed already
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch (error) {
    throw new Problem("failed", `The server sent something that is no answer (${error.message}).`);
  }
}

function lost(error, message) {
  return error instanceof TypeError ? new Problem("gone", message) : error; // else: AbortError
}

function fromError(status, error, retryAfter = null) {
  const told = typeof error.message === "string" ? error.message : "";
  if (status === 401)
    return new Problem(
      "key",
      key.get() ? "The server does not accept this API key." : "The server asks for an API key.",
    );
  if (error.code === "context_length_exceeded") {
    return new Problem(
      "context",
      "This conversation is longer than the model's context. Edit an earlier message, shorten the answer's limit, " +
        `or begin a new conversation. (${told})`,
    );
  }
  if (status === 429) {
    const when = retryAfter ? ` Try again in ${retryAfter} ${retryAfter === 1 ? "second" : "seconds"}.` : "";
    return new Problem("busy", `The server has as many requests as it takes.${when}`, retryAfter);
  }
  if (status === 503) return new Problem("busy", "The server is starting or shutting down.", retryAfter);
  if (status >= 400 && status < 500)
    return new Problem("refused", `The server refused the request: ${told || `status ${status}`}`);
  return new Problem("failed", `The server failed: ${told || `status ${status}`}`);
}

// One answer while it is made: asks the server, gathers the text into the message, measures, and notes it so that a reload keeps
// what there is. Knows no DOM.

import { complete, Problem } from "./api.js";
import { forgetNote, note } from "./store.js";

const NOTE_EVERY_MS = 500;
const ENOUGH_TOKENS = 8; // to speak of a rate

export class Answer {
  #abort = new AbortController();
  #pieces = 0;
  #began = 0;
  #first = null;
  #last = null;
  #noted = 0;

  /** `node`: the message to fill; `onText()` is called after each piece. */
  constructor(node, onText) {
    this.node = node;
    this.onText = onText;
    this.model = null; // the name of the one that answered, once it has
  }

  /**
   * Makes the answer. `prepare(signal)` gives {body, leftOut}: the request, and how many messages did not fit in it. Resolves
   * when it is over, however it ended; returns the Problem, or null.
   */
  async run(prepare) {
    const { node } = this;
    this.#began = performance.now();
    let problem = null;
    let usage = null;
    let leftOut = 0;
    try {
      const prepared = await prepare(this.#abort.signal);
      leftOut = prepared.leftOut;
      const end = await complete(prepared.body, this.#abort.signal, (piece) => this.#add(piece));
      usage = end.usage;
      this.model = end.model;
      node.status = end.finish === "length" ? "length" : "done";
    } catch (error) {
      if (error.name === "AbortError") node.status = "stopped";
      else if (error instanceof Problem) problem = error;
      else throw error;
    }
    if (problem) {
      node.status = "failed";
      node.problem = problem.message;
    }
    node.figures = this.#figures(usage, leftOut);
    return problem;
  }

  /** Ends it; the server stops working on it too. */
  stop() {
    this.#abort.abort();
  }

  /** Writes down what there is, at once. */
  keep() {
    note(this.node);
    this.#noted = performance.now();
  }

  /** To be called when the message is saved. */
  forget() {
    forgetNote(this.node);
  }

  #add(piece) {
    const now = performance.now();
    this.#first ??= now;
    this.#last = now;
    this.#pieces += 1;
    this.node.content += piece;
    if (now - this.#noted > NOTE_EVERY_MS) this.keep();
    this.onText();
  }

  /** Seconds and tokens. `about`: the server had no time to count, so that pieces of text stand for tokens. */
  #figures(usage, leftOut) {
    if (this.#first === null) return null;
    const tokens = usage?.completion_tokens ?? this.#pieces;
    const spent = (this.#last - this.#first) / 1000;
    return {
      about: !usage,
      tokens,
      firstToken: (this.#first - this.#began) / 1000,
      ...(leftOut > 0 && { leftOut }),
      ...(tokens >= ENOUGH_TOKENS && spent > 0 && { rate: (tokens - 1) / spent }),
      ...(usage && {
        prompt: usage.prompt_tokens,
        cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
        context: usage.prompt_tokens + usage.completion_tokens,
      }),
    };
  }
}

// A conversation that has grown longer than the model's context: which of its messages are sent. The instructions and the newest
// stay, whole exchanges are left out from the beginning on. Knows messages and the server's count of their tokens.

import { countTokens } from "./api.js";

const ROOM = 0.25; // of the context is left for the answer, unless its length is set
const AROUND_A_MESSAGE = 16; // bytes, for what a chat format writes between messages

/** {messages, leftOut}: what fits, and how many messages are missing. `longest`: of the answer, in tokens, or null. */
export async function fitting(messages, contextLength, longest, signal) {
  const limit = contextLength - (longest ?? Math.ceil(contextLength * ROOM));
  const all = { messages, leftOut: 0 };
  if (!(limit > 0) || mostTokens(messages) <= limit) return all;
  const start = messages[0].role === "system" ? 1 : 0;
  const turns = messages.flatMap(({ role }, index) => (role === "user" ? [index] : []));
  const from = (turn) => [...messages.slice(0, start), ...messages.slice(turns[turn])];
  const fits = async (some) => (await countTokens(some, signal)) <= limit;
  if (turns.length < 2 || (await fits(messages))) return all;
  let low = 1; // the first turn that may be kept; the last one is, whether it fits or not: then the server says so
  let high = turns.length - 1;
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    if (await fits(from(middle))) high = middle;
    else low = middle + 1;
  }
  return { messages: from(low), leftOut: turns[low] - start };
}

/** No token is less than a byte. */
function mostTokens(messages) {
  const encoder = new TextEncoder();
  return messages.reduce((sum, { content }) => sum + encoder.encode(content).length + AROUND_A_MESSAGE, 0);
}

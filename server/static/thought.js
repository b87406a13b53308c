// Models that reason write it first, between <think> and </think>. Tells it apart from the answer, while both grow. Pure text.

const OPENING = "<think>";
const CLOSING = "</think>";

/**
 * {thought, answer, thinking}: thought is null where there is none; thinking: it has not ended yet. The opening may be
 * missing: some chat formats write it for the model.
 */
export function split(text) {
  const start = text.trimStart();
  const opened = start.startsWith(OPENING);
  if (!opened && start && OPENING.startsWith(start)) return { thought: null, answer: "", thinking: true };
  const end = text.indexOf(CLOSING);
  if (end < 0) {
    return opened
      ? { thought: start.slice(OPENING.length).trimStart(), answer: "", thinking: true }
      : { thought: null, answer: text, thinking: false };
  }
  const before = text.slice(0, end).trim();
  const thought = (opened ? before.slice(OPENING.length) : before).trim();
  return { thought: thought || null, answer: text.slice(end + CLOSING.length).trimStart(), thinking: false };
}

// The sampling settings that a person may change: names and limits as the server's API has them. Checks values; knows no DOM.

export const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.05,
    help: "Higher is more surprising. 0 always takes the likeliest word.",
  },
  {
    name: "max_tokens",
    label: "Longest answer",
    min: 1,
    max: 2 ** 31 - 1,
    step: 1,
    unset: "until it ends",
    help: "In tokens. Empty: until the model ends, or the context is full.",
  },
  {
    name: "top_p",
    label: "Top p",
    min: 0,
    above: true,
    max: 1,
    step: 0.01,
    help: "Keeps the likeliest tokens that together have this probability. 1 is off.",
  },
  { name: "top_k", label: "Top k", min: 0, max: 2 ** 31 - 1, step: 1, help: "Keeps the k likeliest tokens. 0 is off." },
  {
    name: "min_p",
    label: "Min p",
    min: 0,
    max: 1,
    step: 0.01,
    help: "Keeps tokens at least this fraction as likely as the likeliest. 0 is off.",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0,
    above: true,
    max: 2,
    step: 0.01,
    help: "Over 1: what was said becomes less likely. 1 is off.",
  },
  {
    name: "presence_penalty",
    label: "Presence penalty",
    min: -2,
    max: 2,
    step: 0.1,
    help: "Over 0: words that were used already become less likely. 0 is off.",
  },
  {
    name: "frequency_penalty",
    label: "Frequency penalty",
    min: -2,
    max: 2,
    step: 0.1,
    help: "The same, more with each use. 0 is off.",
  },
  {
    name: "seed",
    label: "Seed",
    min: 0,
    max: Number.MAX_SAFE_INTEGER,
    step: 1,
    unset: "a new one each time",
    help: "The same seed gives the same answer to the same conversation.",
  },
  {
    name: "stop",
    label: "Stop at",
    lines: true,
    unset: "nothing",
    help: "An answer ends before any of these texts, one on each line (at most four).",
  },
];

export const MAX_STOPS = 4;

/** What a person typed for a field -> {value} (undefined: nothing), or {problem} in plain words. */
export function read(field, text) {
  if (field.lines) {
    const stops = text.split("\n").filter((line) => line !== "");
    if (stops.length > MAX_STOPS) return { problem: `At most ${MAX_STOPS} texts, one on each line.` };
    return { value: stops.length ? stops : undefined };
  }
  if (!text.trim()) return { value: undefined };
  const value = Number(text.trim().replace(",", "."));
  const problem = check(field, value);
  return problem ? { problem } : { value };
}

/** null, or what is wrong with a value. */
export function check(field, value) {
  if (field.lines) {
    const good =
      Array.isArray(value) && value.length <= MAX_STOPS && value.every((text) => typeof text === "string" && text);
    return good ? null : `${field.label}: at most ${MAX_STOPS} texts`;
  }
  const whole = field.step === 1;
  const good =
    typeof value === "number" &&
    Number.isFinite(value) &&
    value >= field.min &&
    value <= field.max &&
    !(field.above && value === field.min) &&
    !(whole && !Number.isInteger(value));
  if (good) return null;
  const kind = whole ? "A whole number" : "A number";
  const top = field.max > 1e6 ? "" : ` to ${field.max}`;
  return `${kind} ${field.above ? "over" : "from"} ${field.min}${top}${field.above || top ? "" : " up"}.`;
}

/** The settings that are sent, of an untrusted object. Throws an Error that names what is wrong. */
export function checkedSettings(settings) {
  if (typeof settings !== "object" || settings === null || Array.isArray(settings))
    throw new Error("its settings are no object");
  for (const [name, value] of Object.entries(settings)) {
    const field = FIELDS.find((one) => one.name === name);
    if (!field) throw new Error(`"${name.slice(0, 40)}" is no setting`);
    const problem = check(field, value);
    if (problem) throw new Error(`its setting "${name}" is wrong: ${problem}`);
  }
  return { ...settings };
}

// Small helpers around the DOM: elements, icons, the two live regions, copying, saving a file. Knows nothing of conversations.
// Text always enters as text nodes; the one way for HTML is markdown.js.

/** An element. `attributes`: class, text, `on` (event -> handler), and plain attributes; null and false are left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) made.addEventListener(event, handler);
    } else if (name === "text") {
      made.textContent = value;
    } else if (value !== null && value !== undefined && value !== false) {
      made.setAttribute(name === "className" ? "class" : name, value === true ? "" : value);
    }
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon; `label` is its name for everyone who cannot see it, and its tooltip. */
export function iconButton(name, label, attributes = {}) {
  const { class: extra = "", ...rest } = attributes;
  return element(
    "button",
    { type: "button", class: `quiet ${extra}`.trim(), "aria-label": label, title: label, ...rest },
    icon(name),
  );
}

/** Whether a key means "take what I wrote"; while an input method composes a character it does not, in Safari either. */
export const accepts = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

export const byId = (id) => document.getElementById(id);

/** Says a line to screen readers when they have time; `urgent` ones at once. */
export function announce(line, urgent = false) {
  const region = byId(urgent ? "live-urgent" : "live-polite");
  region.textContent = "";
  setTimeout(() => {
    region.textContent = line;
  }, 50); // the same line twice is two changes
}

/** Says something that everybody should know, until a person closes it. */
export function notice(line) {
  byId("notice-text").textContent = line;
  byId("notice").hidden = false;
  announce(line, true);
}

/** Copies text; true if the browser did. Pages that are not on https or this machine have no clipboard API. */
export async function copyText(text) {
  try {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
      return true;
    }
  } catch (error) {
    if (!(error instanceof DOMException)) throw error; // not allowed: the old way may be
  }
  const field = element("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  const focused = document.activeElement;
  field.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return done;
}

/** Copies, and shows on the button for a moment whether that worked. */
export async function copyFrom(button, text) {
  const done = await copyText(text);
  button.classList.toggle("done", done);
  announce(done ? "Copied" : "This browser does not let the page copy");
  setTimeout(() => button.classList.remove("done"), 1500);
}

/** Hands the person a file. */
export function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const number = new Intl.NumberFormat("en-US");

/** 61 MB: bytes in the units of disks and of bandwidth. */
export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${count >= 99.5 || unit === 0 ? Math.round(count) : Number(count.toPrecision(2))} ${units[unit]}`;
}

export const counted = (count, one, many = `${one}s`) => `${number.format(count)} ${count === 1 ? one : many}`;

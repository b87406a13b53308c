// Shows a text in markdown while it grows. Blocks that are complete are rendered once; only the last one is rendered again, and of
// an open code block only what is new is added. What is on the screen is changed where it differs, so that nothing flickers
// and a selection stays.

import { blocks, colour, frameCode, render } from "./markdown.js";
import { element } from "./dom.js";

const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/mu; // of a link, which may be used anywhere before it
const OPENING = /^(`{3,}|~{3,})([^\n]*)\n/u;
const RECOLOUR_GROWTH = 1.25; // so that colouring a code block while it grows costs no more than a few times its length

// A last line that may still become a fence, a rule, a list, a table or the line under a heading.
const UNDECIDED = /^[ \t]*(?:[-=*_+#>|~`: \t]*|\d{1,9}[.)]?[ \t]*|(?:`{3,}|~{3,})[^\n]*)$/u;

/** `text` without the last line while nobody can say what it will be. */
export function decided(text) {
  const start = text.lastIndexOf("\n") + 1;
  return UNDECIDED.test(text.slice(start)) ? text.slice(0, start) : text;
}

export class LiveMarkdown {
  #place;
  #done = 0; // characters of the text whose nodes are final
  #settled = 0; // how many of the nodes
  #fence = null; // an open code block: {start, mark, language, code, shown, coloured}
  #text = "";
  #whole = false;

  constructor(place) {
    this.#place = place;
    place.replaceChildren();
  }

  /** The text as it is now: what it was before and more, or another one. `whole`: it will not grow any more. */
  update(text, whole = false) {
    if (text.includes("\r")) text = text.replace(/\r\n?/gu, "\n"); // as marked does, so that its pieces are ours
    if (text === this.#text && whole === this.#whole) return;
    if (!text.startsWith(this.#text)) this.#place.replaceChildren();
    if (!text.startsWith(this.#text) || this.#whole) this.#begin();
    this.#text = text;
    this.#whole = whole;
    const visible = whole ? text : decided(text);
    if (visible.length < this.#done) return;
    if (whole && DEFINITION.test(text)) {
      this.#begin();
      this.#replace(render(blocks(text)));
      return;
    }
    if (this.#fence && !this.#growFence(visible, whole)) return;
    this.#renderTail(visible, whole);
  }

  #begin() {
    this.#done = this.#settled = 0;
    this.#fence = null;
  }

  #renderTail(visible, whole) {
    const tokens = blocks(visible.slice(this.#done));
    const last = tokens.findLastIndex((token) => token.type !== "space");
    const open = !whole && last >= 0 && tokens[last].type === "code" ? OPENING.exec(tokens[last].raw) : null;
    const fenced = open !== null && closing(tokens[last].raw, open[0].length, open[1]) < 0;
    if (last > 0) {
      const final = tokens.slice(0, last);
      const nodes = render(final);
      const count = nodes.childNodes.length;
      this.#replace(nodes);
      this.#settled += count;
      this.#done += final.reduce((length, token) => length + token.raw.length, 0);
    }
    if (last >= 0 && !fenced) this.#replace(render(tokens.slice(last)));
    if (fenced) this.#beginFence(visible, open);
  }

  #beginFence(visible, [opening, mark, info]) {
    const language = info.trim().split(/\s/u)[0];
    const code = element("code");
    const fence = { start: this.#done + opening.length, mark, language, code, shown: 0, coloured: 0 };
    const frame = frameCode(code, language);
    this.#replace(frame);
    this.#fence = fence;
    this.#growFence(visible, false);
  }

  /** Shows what is new of the open code block. True if it has ended, so that there may be more behind it. */
  #growFence(visible, whole) {
    const fence = this.#fence;
    const end = closing(visible, fence.start, fence.mark, fence.start + fence.shown);
    const stop = end < 0 ? visible.length : end;
    const fresh = visible.slice(fence.start + fence.shown, stop);
    if (fence.code.lastChild?.nodeType === Node.TEXT_NODE) fence.code.lastChild.appendData(fresh);
    else if (fresh) fence.code.append(fresh);
    fence.shown = stop - fence.start;
    const over = end >= 0 || whole;
    if (over || fence.shown >= fence.coloured * RECOLOUR_GROWTH) {
      colour(fence.code, fence.language);
      fence.coloured = fence.shown;
    }
    if (!over) return false;
    const line = end < 0 ? -1 : visible.indexOf("\n", end);
    this.#done = line < 0 ? visible.length : line + 1;
    this.#settled = this.#place.childNodes.length;
    this.#fence = null;
    return true;
  }

  /** Puts these nodes after the settled ones, in place of what is there. */
  #replace(nodes) {
    const holder = document.createDocumentFragment();
    holder.append(nodes);
    morph(this.#place, holder, this.#settled);
  }
}

/** Where the line begins that closes a fence, looking from the line around `from` on; -1 if it is open. */
function closing(text, start, mark, from = start) {
  const line = Math.max(start, text.lastIndexOf("\n", from - 1) + 1);
  const closer = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}[ \\t]*$`, "mu");
  const found = closer.exec(text.slice(line));
  return found ? line + found.index : -1;
}

/** Makes the children of `place` from number `first` on equal to those of `wanted`, which loses them. */
function morph(place, wanted, first = 0) {
  let index = first;
  for (const fresh of [...wanted.childNodes]) {
    const old = place.childNodes[index];
    if (!old) place.append(fresh);
    else if (!old.isEqualNode(fresh)) change(old, fresh);
    index += 1;
  }
  while (place.childNodes.length > index) place.lastChild.remove();
}

function change(old, fresh) {
  const text = old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE;
  if (text && fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.data.length));
  else if (
    old.nodeType === Node.ELEMENT_NODE &&
    fresh.nodeType === Node.ELEMENT_NODE &&
    old.cloneNode().isEqualNode(fresh.cloneNode())
  ) {
    morph(old, fresh);
  } else old.replaceWith(fresh);
}

/** Calls `draw` at animation frames, at most a fifth of the time however long a drawing takes. */
export class Frames {
  #draw;
  #waiting = false;
  #rest = 0; // not before this time

  constructor(draw) {
    this.#draw = draw;
  }

  request() {
    if (this.#waiting) return;
    this.#waiting = true;
    setTimeout(() => requestAnimationFrame(() => this.#run()), Math.max(0, this.#rest - performance.now()));
  }

  #run() {
    this.#waiting = false;
    const began = performance.now();
    this.#draw();
    const ended = performance.now();
    this.#rest = ended + 4 * (ended - began);
  }
}

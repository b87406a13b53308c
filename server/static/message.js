// One message on the page: its text, what can be done with it, its branches and its figures. Tells `actions` what a person wants.

import { accepts, copyFrom, counted, element, iconButton, number } from "./dom.js";
import { Frames, LiveMarkdown } from "./live.js";
import { split } from "./thought.js";
import { siblings } from "./tree.js";

const ENDINGS = {
  stopped: "Stopped.",
  length: "Cut at the longest length that an answer may have.",
};

export class MessageView {
  #actions;
  #body = element("div", { class: "body" });
  #notes = element("div", { class: "notes" });
  #tools = element("div", { class: "tools" });
  #editor = null;
  #thought = null; // {element, title, live} of what a model that reasons wrote first
  #live = new LiveMarkdown(this.#body);
  #frames = new Frames(() => this.#draw(false));

  /** `actions`: regenerate(node), edit(node, text), go(node), retry(node), model() -> what the server runs. */
  constructor(node, actions) {
    this.node = node;
    this.#actions = actions;
    const name = element("h2", { id: `name-${node.id}`, class: "who", text: node.role === "user" ? "You" : "Answer" });
    this.element = element(
      "li",
      { class: `message ${node.role}` },
      element("article", { "aria-labelledby": name.id }, name, this.#body, this.#notes, this.#tools),
    );
  }

  /** Shows the message as it is now; `running`: it still grows. */
  update(conversation, running) {
    if (this.node.role === "user") this.#body.textContent = this.node.content;
    else if (running) this.grow();
    else this.#draw(true);
    this.element.toggleAttribute("data-running", running);
    this.#body.toggleAttribute("aria-busy", running);
    this.#showNotes(running);
    this.#showTools(conversation, running);
  }

  /** There is more text: shown at the next frame. */
  grow() {
    this.#frames.request();
  }

  edit() {
    if (this.#editor) return;
    const field = element("textarea", {
      "aria-label": "Edit your message",
      rows: Math.min(12, this.node.content.split("\n").length + 1),
    });
    field.value = this.node.content;
    const close = () => {
      this.#editor.replaceWith(this.#body);
      this.#editor = null;
      this.#tools.hidden = false;
      this.#tools.querySelector(".edit")?.focus();
    };
    const send = () => {
      const text = field.value.trim();
      if (!text) return;
      close();
      this.#actions.edit(this.node, text);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (accepts(event)) {
        event.preventDefault();
        send();
      }
    });
    this.#editor = element(
      "div",
      { class: "editor" },
      field,
      element(
        "div",
        { class: "row" },
        element("button", { type: "button", class: "primary", text: "Send as a new branch", on: { click: send } }),
        element("button", { type: "button", text: "Cancel", on: { click: close } }),
      ),
    );
    this.#body.replaceWith(this.#editor);
    this.#tools.hidden = true;
    field.focus();
  }

  #draw(whole) {
    const { thought, answer, thinking } = split(this.node.content);
    this.#showThought(thought, thinking && !whole, whole);
    this.#live.update(answer, whole);
    if (this.node.content) this.#notes.querySelector(".waiting")?.remove();
    if (!whole) this.#actions.grown();
  }

  #showThought(text, thinking, whole) {
    if (text === null) {
      this.#thought?.element.remove();
      this.#thought = null;
      return;
    }
    if (!this.#thought) {
      const place = element("div", { class: "body" });
      const title = element("summary");
      const folded = element("details", { class: "thought" }, title, place);
      this.#thought = { element: folded, title, live: new LiveMarkdown(place) };
      this.#body.before(folded);
    }
    this.#thought.title.textContent = thinking ? "Thinking…" : "Thought first";
    this.#thought.live.update(text, whole);
  }

  #showNotes(running) {
    const { node } = this;
    const notes = [];
    if (running && !node.content) notes.push(element("p", { class: "waiting", text: "Reading…" }));
    if (!running && node.status === "open")
      notes.push(element("p", { text: "This answer is being made in another tab." }));
    if (node.figures?.leftOut) {
      const oldest = counted(node.figures.leftOut, "oldest message is", "oldest messages are");
      notes.push(element("p", { text: `The context is full: the ${oldest} no longer seen.` }));
    }
    if (ENDINGS[node.status])
      notes.push(element("p", { text: node.content ? ENDINGS[node.status] : "Stopped before the first word." }));
    if (node.status === "done" && node.role === "assistant" && !node.content)
      notes.push(element("p", { text: "The answer is empty." }));
    if (node.problem) {
      notes.push(
        element(
          "div",
          { class: "problem" },
          element("p", { text: node.problem }),
          element("button", { type: "button", text: "Try again", on: { click: () => this.#actions.retry(node) } }),
        ),
      );
    }
    this.#notes.replaceChildren(...notes);
  }

  #showTools(conversation, running) {
    const { node } = this;
    const focused = this.#tools.contains(document.activeElement) ? document.activeElement.dataset.tool : null;
    const tool = (name, drawing, label, click, more = {}) =>
      iconButton(drawing, label, { class: name, "data-tool": name, on: { click }, ...more });
    const all = siblings(conversation, node);
    const at = all.indexOf(node);
    const tools = [];
    if (all.length > 1) {
      const what = node.role === "user" ? "message" : "answer";
      tools.push(
        element(
          "span",
          { class: "branches", role: "group", "aria-label": "Branches" },
          tool("previous", "left", `Previous ${what}`, () => this.#actions.go(all[at - 1], "previous"), {
            "aria-disabled": at === 0 && "true",
          }),
          element("span", { text: `${at + 1}/${all.length}` }),
          tool("next", "right", `Next ${what}`, () => this.#actions.go(all[at + 1], "next"), {
            "aria-disabled": at === all.length - 1 && "true",
          }),
        ),
      );
    }
    if (node.content)
      tools.push(
        tool("copy", "copy", "Copy this text", (event) => copyFrom(event.currentTarget, split(node.content).answer)),
      );
    if (node.role === "user") tools.push(tool("edit", "pencil", "Edit this message", () => this.edit()));
    else if (!running && !node.problem) {
      tools.push(tool("regenerate", "again", "Make another answer", () => this.#actions.regenerate(node)));
    }
    if (!running && node.figures)
      tools.push(element("p", { class: "figures", text: figuresLine(node.figures, this.#actions.model()) }));
    this.#tools.replaceChildren(...tools);
    if (focused) this.focusTool(focused);
  }

  focusTool(name) {
    this.#tools.querySelector(`[data-tool="${name}"]`)?.focus();
  }
}

/** "312 tokens at 84.0 tok/s · first token after 0.21 s · context 512 of 2,048 · …" */
export function figuresLine(figures, model) {
  const about = figures.about ? "about " : "";
  const rate = figures.rate ? ` at ${about}${speed(figures.rate)}` : "";
  const parts = [`${about}${counted(figures.tokens, "token")}${rate}`];
  if (figures.firstToken !== undefined) parts.push(`first token after ${seconds(figures.firstToken)}`);
  if (figures.context !== undefined) {
    const whole = model?.contextLength ? ` of ${number.format(model.contextLength)}` : "";
    const reused = figures.cached ? `, ${number.format(figures.cached)} reused` : "";
    parts.push(`context ${number.format(figures.context)}${whole}${reused}`);
  }
  return parts.join(" · ");
}

export function speed(rate) {
  return `${rate >= 99.5 ? number.format(Math.round(rate)) : rate.toPrecision(3)} tok/s`;
}

export function seconds(time) {
  return time < 0.0995 ? `${Math.max(1, Math.round(time * 1000))} ms` : `${time.toFixed(time < 10 ? 2 : 1)} s`;
}

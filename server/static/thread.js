// The messages of the conversation that is seen: keeps what stays the same, follows the end of a growing answer unless the person
// reads elsewhere. Knows messages, not where they come from.

import { byId, copyFrom } from "./dom.js";
import { MessageView } from "./message.js";
import { path } from "./tree.js";

const NEAR_END = 80; // pixels from the end that still count as being there

export class Thread {
  #list = byId("messages");
  #scroller = byId("scroller");
  #views = new Map(); // message id -> MessageView
  #follows = true;
  #conversation = null;
  #actions;

  constructor(actions) {
    this.#actions = { ...actions, grown: () => this.#keepAtEnd() };
    this.#scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    byId("to-end").addEventListener("click", () => this.toEnd());
    this.#list.addEventListener("click", (event) => {
      const button = event.target.closest(".copy-code");
      if (button) copyFrom(button, button.closest(".code").querySelector("code").textContent);
    });
    new ResizeObserver(() => this.#keepAtEnd()).observe(this.#scroller);
  }

  /** Shows a conversation; `running` is the message that grows now, or null. */
  show(conversation, running) {
    const seen = path(conversation);
    const other = this.#conversation !== conversation;
    if (other) this.#views.clear();
    this.#conversation = conversation;
    const views = seen.map((node) => {
      const view = this.#views.get(node.id);
      return view && view.node === node ? view : new MessageView(node, this.#actions);
    });
    this.#views = new Map(views.map((view) => [view.node.id, view]));
    const wanted = views.map((view) => view.element);
    for (const old of [...this.#list.children]) if (!wanted.includes(old)) old.remove();
    wanted.forEach((item, index) => {
      if (this.#list.children[index] !== item) this.#list.insertBefore(item, this.#list.children[index] ?? null);
    });
    for (const view of views) view.update(conversation, view.node === running);
    if (other) this.toEnd();
    else this.#keepAtEnd();
  }

  /** A message has more text. */
  grow(node) {
    this.#views.get(node.id)?.grow();
  }

  view(node) {
    return this.#views.get(node.id) ?? null;
  }

  toEnd() {
    this.#follows = true;
    this.#keepAtEnd();
  }

  #keepAtEnd() {
    if (this.#follows) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#scrolled();
  }

  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
    byId("to-end").hidden = this.#follows;
  }
}

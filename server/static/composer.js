// Where messages are written. What is not sent yet is kept for each conversation, over a reload too. Knows no conversations.

import { accepts, byId } from "./dom.js";
import { passing } from "./small.js";

const DRAFT = "torchchat.draft.";
const touch = window.matchMedia("(pointer: coarse)"); // where focusing a text brings up a keyboard over half the page

export class Composer {
  #text = byId("composer-text");
  #answering = false;
  #place = "";
  #actions;

  /** `actions`: send(text), stop(), editLast(). */
  constructor(actions) {
    this.#actions = actions;
    this.#text.addEventListener("input", () => this.#changed());
    this.#text.addEventListener("keydown", (event) => this.#key(event));
    byId("send").addEventListener("click", () => this.#send());
    byId("stop").addEventListener("click", () => actions.stop());
  }

  /** Shows the draft of a conversation, which `place` stands for. */
  open(place) {
    this.#place = place;
    this.#text.value = passing.get(DRAFT + place) ?? "";
    this.#changed();
  }

  focus() {
    if (!touch.matches) this.#text.focus();
  }

  /** Whether an answer is being made: then there is a stop button, and nothing can be sent. */
  answering(yes) {
    const focused = document.activeElement === byId("stop") || document.activeElement === byId("send");
    this.#answering = yes;
    byId("stop").hidden = !yes;
    byId("send").hidden = yes;
    if (focused) (yes ? byId("stop") : this.#text).focus();
  }

  escape() {
    if (this.#answering) this.#actions.stop();
    else if (document.activeElement === this.#text) this.#text.blur();
  }

  #key(event) {
    if (accepts(event)) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && !this.#text.value) {
      event.preventDefault();
      this.#actions.editLast();
    }
  }

  #send() {
    const text = this.#text.value.trim();
    if (!text || this.#answering) return;
    this.#text.value = "";
    this.#changed();
    this.#actions.send(text);
  }

  #changed() {
    const { value } = this.#text;
    byId("send").setAttribute("aria-disabled", String(!value.trim()));
    if (value) passing.set(DRAFT + this.#place, value);
    else passing.remove(DRAFT + this.#place);
    if (CSS.supports("field-sizing", "content")) return;
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
  }
}

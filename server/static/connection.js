// Whether the server is there: says so when it is not, asks again and again, and says when it is back.

import { healthy } from "./api.js";
import { announce, byId } from "./dom.js";

const LOOK_EVERY_MS = 15_000; // while all is well and the page is seen
const AGAIN_MS = [1000, 1000, 2000, 4000, 8000]; // the last one from then on

export class Connection {
  #gone = false;
  #tries = 0;
  #timer = null;
  #back;

  /** `back()` is called when the server is there again. */
  constructor(back) {
    this.#back = back;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.#look();
    });
    this.#wait();
  }

  /** A request found no server. */
  lost() {
    if (this.#gone) return;
    this.#gone = true;
    this.#tries = 0;
    const banner = byId("banner");
    banner.textContent =
      "The server does not answer. Is it still running? This page keeps trying to reach it; what you write is kept.";
    banner.hidden = false;
    this.#wait();
  }

  async #look() {
    clearTimeout(this.#timer);
    const there = await healthy();
    if (there && this.#gone) {
      this.#gone = false;
      byId("banner").hidden = true;
      announce("The server is back");
      this.#back();
    } else if (!there) {
      this.lost();
    }
    this.#wait();
  }

  #wait() {
    clearTimeout(this.#timer);
    const pause = this.#gone ? AGAIN_MS[Math.min(this.#tries, AGAIN_MS.length - 1)] : LOOK_EVERY_MS;
    this.#tries += 1;
    this.#timer = setTimeout(() => (document.hidden && !this.#gone ? this.#wait() : this.#look()), pause);
  }
}

// The list of conversations, newest first, and the search in it. Tells `actions` what a person wants.

import { byId, counted, element } from "./dom.js";
import { search } from "./tree.js";

const DAY = 86_400_000;
const wide = window.matchMedia("(min-width: 56rem)");

export class Sidebar {
  #element = byId("sidebar");
  #list = byId("conversations");
  #search = byId("search");
  #render = () => {};

  /** `actions`: select(id). */
  constructor(actions) {
    this.actions = actions;
    this.#search.addEventListener("input", () => this.#render());
    this.#search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.#search.value) {
        this.#search.value = "";
        this.#render();
        event.stopPropagation();
      } else if (event.key === "ArrowDown") {
        event.preventDefault();
        this.#list.querySelector("a")?.focus();
      }
    });
    this.#list.addEventListener("keydown", (event) => this.#move(event));
    byId("open-sidebar").addEventListener("click", () => this.open());
    byId("close-sidebar").addEventListener("click", () => this.close());
    byId("shade").addEventListener("click", () => this.close());
    this.#element.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !wide.matches) this.close();
    });
    wide.addEventListener("change", () => this.#place(false));
    this.#place(false);
  }

  /** Shows these; `current` is the id of the one that is seen, `running` the ids of those with an answer in the making. */
  show(conversations, current, running) {
    this.#render = () => {
      const words = this.#search.value;
      const found = conversations
        .map((conversation) => ({ conversation, place: search(conversation, words) }))
        .filter(({ place }) => !words.trim() || place !== null)
        .sort((a, b) => b.conversation.updated - a.conversation.updated);
      const groups = new Map();
      for (const one of found) {
        const name = words.trim() ? counted(found.length, "conversation") : age(one.conversation.updated);
        groups.set(name, [...(groups.get(name) ?? []), one]);
      }
      const empty = words.trim() ? "Nothing found." : "Conversations stay in this browser.";
      this.#list.replaceChildren(
        ...(found.length ? [] : [element("p", { class: "hint", text: empty })]),
        ...[...groups].map(([name, ones], index) =>
          element(
            "section",
            { "aria-labelledby": `group-${index}` },
            element("h2", { id: `group-${index}`, text: name }),
            element("ul", {}, ...ones.map((one) => this.#item(one, current, running))),
          ),
        ),
      );
    };
    this.#render();
  }

  focusSearch() {
    if (!wide.matches) this.open();
    this.#search.focus();
    this.#search.select();
  }

  focusCurrent() {
    (this.#list.querySelector("[aria-current]") ?? byId("new")).focus();
  }

  open() {
    this.#place(true);
    byId("close-sidebar").focus();
  }

  /** On a narrow page the list goes away, and the focus back to what opened it. */
  close() {
    const inside = this.#element.contains(document.activeElement);
    this.#place(false);
    if (!wide.matches && inside) byId("open-sidebar").focus();
  }

  #place(open) {
    const drawer = !wide.matches;
    this.#element.classList.toggle("open", open);
    this.#element.inert = drawer && !open;
    byId("main").inert = drawer && open;
    byId("shade").hidden = !(drawer && open);
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
  }

  #item({ conversation, place }, current, running) {
    const busy = running.has(conversation.id);
    const link = element(
      "a",
      {
        href: `#${conversation.id}`,
        "aria-current": conversation.id === current && "page",
        on: {
          click: (event) => {
            event.preventDefault();
            this.actions.select(conversation.id);
            this.close();
          },
        },
      },
      element("span", { class: "name", text: conversation.title || "Untitled" }),
    );
    if (busy) link.append(element("span", { class: "busy", role: "img", "aria-label": "an answer is being made" }));
    if (place)
      link.append(element("span", { class: "found" }, place[0], element("mark", { text: place[1] }), place[2]));
    return element("li", {}, link);
  }

  #move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const links = [...this.#list.querySelectorAll("a")];
    const next = links[links.indexOf(document.activeElement) + step];
    (next ?? (step < 0 ? this.#search : document.activeElement)).focus();
  }
}

function age(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 6 * DAY) return "This week";
  return new Date(time).toLocaleDateString("en-US", { month: "long", year: "numeric" });
}

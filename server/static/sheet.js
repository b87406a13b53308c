// The settings of a conversation: its system text and what differs from the server's sampling defaults. Changes the conversation
// as the person types, and only to values that the server takes.

import { announce, byId, element } from "./dom.js";
import { FIELDS, read } from "./sampling.js";

export class Sheet {
  #dialog = byId("settings-dialog");
  #system = byId("system");
  #conversation = null;
  #defaults = {};
  #changed;

  /** `changed(conversation)` is called after each change. */
  constructor(changed) {
    this.#changed = changed;
    this.#system.addEventListener("input", () => {
      this.#conversation.system = this.#system.value;
      this.#changed(this.#conversation);
    });
    byId("settings-done").addEventListener("click", () => this.#dialog.close());
    byId("settings-reset").addEventListener("click", () => {
      this.#conversation.settings = {};
      this.#changed(this.#conversation);
      this.#fill();
      announce("All sampling settings are the server's");
    });
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close(); // beside the sheet
    });
  }

  /** `defaults`: the server's sampling settings, by name. */
  open(conversation, defaults) {
    this.#conversation = conversation;
    this.#defaults = defaults;
    this.#system.value = conversation.system;
    this.#fill();
    this.#dialog.showModal();
  }

  #fill() {
    byId("sampling").replaceChildren(...FIELDS.map((field) => this.#row(field)));
  }

  #row(field) {
    const standard = this.#defaults[field.name] ?? undefined;
    const value = this.#conversation.settings[field.name] ?? standard;
    const ids = { id: `set-${field.name}`, hint: `hint-${field.name}` };
    const input = element(field.lines ? "textarea" : "input", {
      id: ids.id,
      rows: field.lines ? "2" : null,
      inputmode: field.lines ? null : "decimal",
      autocomplete: "off",
      placeholder: field.unset ?? null,
      "aria-describedby": ids.hint,
    });
    input.value = shown(field, value);
    const hint = element("p", { id: ids.hint, class: "hint", text: field.help });
    const row = element("div", { class: "field" }, element("label", { for: ids.id, text: field.label }), input, hint);
    const mark = () => row.toggleAttribute("data-changed", field.name in this.#conversation.settings);
    input.addEventListener("input", () => {
      const { value: typed, problem } = read(field, input.value);
      input.setAttribute("aria-invalid", String(Boolean(problem)));
      hint.textContent = problem ?? field.help;
      hint.classList.toggle("wrong", Boolean(problem));
      if (problem) return;
      const { settings } = this.#conversation;
      if (typed === undefined || JSON.stringify(typed) === JSON.stringify(standard)) delete settings[field.name];
      else settings[field.name] = typed;
      mark();
      this.#changed(this.#conversation);
    });
    input.addEventListener("blur", () => {
      // what is empty or wrong: what holds is shown again
      input.value = shown(field, this.#conversation.settings[field.name] ?? standard);
      input.setAttribute("aria-invalid", "false");
      hint.textContent = field.help;
      hint.classList.remove("wrong");
    });
    mark();
    return row;
  }
}

function shown(field, value) {
  if (value === undefined || value === null) return "";
  return field.lines ? value.join("\n") : String(value);
}

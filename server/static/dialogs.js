// Questions to the person, as modal dialogs. The browser keeps the focus inside and gives it back. Knows nothing of conversations.

import { accepts, byId } from "./dom.js";

/**
 * Asks, and resolves to null (no), or {text, checked}. `field`: {label, value, secret} for one line of text; `option`: the words
 * of a checkbox.
 */
export function ask({ title, text = "", yes = "OK", danger = false, field = null, option = null }) {
  const dialog = byId("ask-dialog");
  const input = byId("ask-field");
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-text").hidden = !text;
  byId("ask-label").textContent = field?.label ?? "";
  byId("ask-label").hidden = input.hidden = !field;
  input.type = field?.secret ? "password" : "text";
  input.value = field?.value ?? "";
  byId("ask-option").hidden = !option;
  byId("ask-check-text").textContent = option ?? "";
  byId("ask-check").checked = false;
  byId("ask-yes").textContent = yes;
  byId("ask-yes").classList.toggle("danger", danger);
  return new Promise((resolve) => {
    const answered = new AbortController();
    const listen = (id, event, handler) => byId(id).addEventListener(event, handler, { signal: answered.signal });
    const finish = (answer) => {
      answered.abort();
      dialog.close();
      resolve(answer);
    };
    const accept = () => {
      if (field && !input.value.trim()) input.focus();
      else finish({ text: input.value.trim(), checked: byId("ask-check").checked });
    };
    listen("ask-yes", "click", accept);
    listen("ask-no", "click", () => finish(null));
    listen("ask-dialog", "cancel", (event) => {
      event.preventDefault();
      finish(null);
    });
    listen("ask-field", "keydown", (event) => {
      if (accepts(event)) {
        event.preventDefault();
        accept();
      }
    });
    if (!dialog.open) dialog.showModal();
    if (field) input.select();
    else byId(danger ? "ask-no" : "ask-yes").focus();
  });
}

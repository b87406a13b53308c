// Keyboard shortcuts: what each does, their list, and whether those of one key are wanted. Knows no conversations.

import { byId, element } from "./dom.js";
import { lasting } from "./small.js";

const SWITCH = "torchchat.single-keys";
const EVERYWHERE = [
  ["Enter", "sends the message"],
  ["Shift Enter", "a new line"],
  ["Up", "in an empty message box: edits the last message"],
  ["Esc", "stops the answer; without one, leaves the message box"],
];

/** `shortcuts`: [[key, what it does, function]], for when nothing is being typed. */
export function listenForKeys(shortcuts) {
  const dialog = byId("keys-dialog");
  const box = byId("single-keys");
  box.checked = lasting.get(SWITCH) !== "off";
  box.addEventListener("change", () => lasting.set(SWITCH, box.checked ? "on" : "off"));
  const rows = [...EVERYWHERE, ...shortcuts, ["?", "this list"]];
  byId("keys-list").replaceChildren(
    ...rows.map(([key, does]) =>
      element(
        "tr",
        {},
        element("td", {}, ...key.split(" ").map((one) => element("kbd", { text: one }))),
        element("td", { text: does }),
      ),
    ),
  );
  byId("show-keys").addEventListener("click", () => dialog.showModal());
  byId("keys-done").addEventListener("click", () => dialog.close());
  document.addEventListener("keydown", (event) => {
    const modified = event.ctrlKey || event.metaKey || event.altKey;
    if (!box.checked || modified || event.isComposing || typing(event.target) || document.querySelector("dialog[open]"))
      return;
    const action = event.key === "?" ? () => dialog.showModal() : shortcuts.find(([key]) => key === event.key)?.[2];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

/** A dialog that closes takes its fields off the page at once, and the focus only before the next frame. */
const typing = (target) => target.matches?.("input, textarea, select, [contenteditable]") && target.checkVisibility();

/** Keyboard shortcuts: single keys outside text fields, and a dialog that lists them. */

import { $, make } from "./dom.js";
import { store, stored } from "./history.js";

const OFF = "blip2-keys-off";
const TYPED = "input:not([type=checkbox], [type=range]), textarea, select, [contenteditable]";

/** `keys`: `[key, description, act]`, in the order of the list. `act` is null if other code handles the key. */
export function listen(keys) {
  const rows = keys.map(([key, words]) => [make("dt", {}, make("kbd", { text: key })), make("dd", { text: words })]);
  $("keys-list").replaceChildren(...rows.flat());
  $("keys-on").checked = stored(OFF) !== "yes";
  $("keys-on").addEventListener("change", ({ target }) => store(OFF, target.checked ? null : "yes"));
  $("keys-open").addEventListener("click", () => $("keys").showModal());
  $("keys-close").addEventListener("click", () => $("keys").close());
  $("keys").addEventListener("click", ({ target }) => target === $("keys") && $("keys").close()); // a click outside the dialog

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    const isTyping = event.target.closest?.(TYPED);
    if (event.key !== "Escape" && (isTyping || event.repeat || !$("keys-on").checked)) return;
    const act = keys.find(([key]) => key === (event.key === "Escape" ? "Esc" : event.key))?.[2];
    if (!act) return;
    act(event);
    if (event.key !== "Escape") event.preventDefault();
  });
}

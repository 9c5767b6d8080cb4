/** Finding and making elements. Texts of people, models and servers are inserted as text, never as HTML. */

export const $ = (id) => document.getElementById(id);

export function make(tag, { class: name = "", text, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export function button(text, onClick, attributes = {}) {
  const made = make("button", { type: "button", text, ...attributes });
  made.addEventListener("click", onClick);
  return made;
}

/** For screen readers: announces a finished text once. */
export function speak(text) {
  $("spoken").textContent = text;
}

let again = null;

/** Shows an error in one sentence; `retry`: what to do again, if that may help. */
export function notice(text, retry = null) {
  again = retry;
  $("notice-again").hidden = retry === null;
  $("notice").hidden = false;
  $("notice-text").textContent = text; // only announced if it is set after it is shown
}

export function closeNotice() {
  $("notice").hidden = true;
  $("notice-text").textContent = ""; // so that the same text is announced again
}

/** The action that the notice offers to retry, if any. */
export function tryAgain() {
  if ($("notice").hidden || !again) return;
  closeNotice();
  again();
}

$("notice-close").addEventListener("click", () => {
  closeNotice();
  const next = ["drop", "question"].map($).find((each) => each.checkVisibility()); // the button with the focus is gone
  if (matchMedia("(pointer: fine)").matches) next?.focus({ preventScroll: true });
});
$("notice-again").addEventListener("click", tryAgain);

/** Finding and making elements. Whatever people, models or servers wrote goes in as text, never as HTML. */

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

/** For those who listen: once, when it is whole. */
export function speak(text) {
  $("spoken").textContent = text;
}

let again = null;

/** What went wrong, in one sentence; `retry`, where it may go better next time. */
export function notice(text, retry = null) {
  again = retry;
  $("notice-again").hidden = retry === null;
  $("notice").hidden = false;
  $("notice-text").textContent = text; // after it is shown: then it is announced
}

export function closeNotice() {
  $("notice").hidden = true;
  $("notice-text").textContent = ""; // the same words may come again, and are announced again
}

/** What the notice offers to do again, if it is there and offers something. */
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

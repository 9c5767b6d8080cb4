/**
 * The last images with captions and answers, only in this browser (IndexedDB).
 *
 * If the browser refuses to store anything, the page works without it and says so.
 */

import { $, button, make, speak } from "./dom.js";

const MAX_ENTRIES = 50;
const MAX_BYTES_KEPT = 64 * 2 ** 20;
const OFF = "blip2-history-off";
const STORE = "images";
/** One database per server path: several servers may share a host behind a proxy. */
const NAME = `blip2 ${location.pathname}`;

export class History {
  /** `onOpen(entry)`: an entry is opened again, as `entryOf` made it. */
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.done = Promise.resolve(); // in order: of two changes to an image the later one counts
    $("history-keep").checked = stored(OFF) !== "yes";
    $("history-keep").addEventListener("change", ({ target }) => store(OFF, target.checked ? null : "yes"));
    $("history-clear").addEventListener("click", () => {
      if (confirm(`Remove all ${$("history-count").textContent} images from the history?`)) this.#change((images) => images.clear(), "The history is empty.");
    });
    this.#change(null);
  }

  save(image) {
    const entry = entryOf(image);
    if (!$("history-keep").checked || !(entry.caption || entry.said.length)) return;
    this.#change((images) => images.put(entry));
  }

  /** Changes the images, drops the oldest beyond the limit, and shows the rest. */
  #change(act, words = "") {
    this.done = this.done.then(async () => {
      try {
        const images = await opened();
        act?.(images);
        const entries = await promised(images.getAll());
        entries.sort((one, other) => other.at - one.at);
        let bytes = 0;
        const kept = entries.filter((entry, place) => (bytes += entry.file.size) <= MAX_BYTES_KEPT && place < MAX_ENTRIES);
        for (const entry of entries) if (!kept.includes(entry)) images.delete(entry.id);
        await finished(images.transaction);
        this.#show(kept);
        if (words) speak(words);
      } catch (error) {
        console.info("no history:", error);
        $("history-note").textContent = "This browser does not store the history, so it ends with this page.";
        $("history").hidden = false;
      }
    });
  }

  #show(entries) {
    const rows = entries.map((entry) => {
      const date = new Date(entry.at).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
      const count = entry.said.length;
      const about = count ? `${date}, ${count} ${count === 1 ? "answer" : "answers"}` : date;
      const open = make("button", { type: "button", class: "entry" });
      open.append(make("img", { src: entry.thumbnail, alt: entry.name, width: "48", height: "48" }), make("span", {}, make("span", { text: entry.caption || entry.name }), make("span", { class: "quiet small", text: about })));
      open.addEventListener("click", () => this.onOpen(entry));
      const remove = button("Remove", () => this.#change((images) => images.delete(entry.id), "Removed from the history."), { class: "plain", "aria-label": `Remove from the history: ${entry.caption || entry.name}` });
      return make("li", { class: "line" }, open, remove);
    });
    const hadFocus = $("history").contains(document.activeElement);
    $("history-list").replaceChildren(...rows);
    $("history-count").textContent = String(entries.length);
    $("history-clear").hidden = !entries.length;
    $("history").hidden = false;
    const lost = document.activeElement === document.body || !document.activeElement.checkVisibility();
    if (hadFocus && lost) $("history").firstElementChild.focus(); // the focused element is gone
  }
}

const entryOf = ({ id, file, name, thumbnail, note, caption, model, description, turns }) => {
  const said = turns.filter((turn) => turn.text).map(({ question, text }) => ({ question, text }));
  return { id, at: Date.now(), file, name, thumbnail, note, caption, model, description, said };
};

/** The store of a new transaction. Throws if the browser refuses. */
async function opened() {
  const asked = indexedDB.open(NAME, 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore(STORE, { keyPath: "id" });
  const database = await promised(asked);
  const transaction = database.transaction(STORE, "readwrite");
  transaction.addEventListener("complete", () => database.close());
  transaction.addEventListener("abort", () => database.close());
  return transaction.objectStore(STORE);
}

const promised = (asked) =>
  new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = asked.onblocked = () => reject(asked.error);
  });

const finished = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.addEventListener("complete", resolve);
    transaction.addEventListener("abort", () => reject(transaction.error));
  });

/** A setting of this browser; null if it is not set or cannot be stored. */
export function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function store(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, value);
  } catch {
    // It lasts until the page is closed.
  }
}

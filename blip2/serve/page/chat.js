/** Questions and streamed answers about an image; earlier turns are sent along. Each image has its own chat. */

import { Refusal, isAbort, pieces, request } from "./api.js";
import { $, button, make, speak } from "./dom.js";
import { copyButton, markdownOf } from "./export.js";
import { dataUrl } from "./image.js";

export class Chat {
  /**
   * `look(fields, what)` shows where the model looks; null where the server does not offer it. `onAnswer(image)` is
   * called when there is another answer about it.
   */
  constructor(onAnswer) {
    Object.assign(this, { look: null, onAnswer, image: null });
    $("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const question = $("question").value.trim();
      if (question && !this.running) this.ask(question);
    });
    $("stop").addEventListener("click", () => this.stop());
    $("copy-all").append(copyButton("Copy conversation as Markdown", () => markdownOf(this.image), { class: "plain" }));
  }

  /** The answer in progress about the shown image. Answers about other images continue meanwhile. */
  get running() {
    return this.image?.running;
  }

  begin(image) {
    this.image = image;
    $("turns").replaceChildren(...image.turns.map((turn) => turn.element));
    image.turns.forEach((turn) => this.#offer(image, turn));
    $("status").textContent = image.status ?? "";
    this.#busy(Boolean(image.running), true);
  }

  /** The turns of an earlier session, each `{question, text}`. */
  restore(image, said) {
    image.turns = said.map(({ question, text }) => made(question, text));
  }

  stop() {
    this.running?.abort();
  }

  async ask(question) {
    $("question").value = "";
    const turn = made(question);
    this.image.turns.push(turn);
    $("turns").append(turn.element);
    await this.#answer(this.image, turn);
  }

  /** Ask the last question again; if it was answered, with sampling. */
  async askAgain(turn) {
    const options = turn.text ? { temperature: 0.7, seed: Math.floor(Math.random() * 2 ** 31) } : {};
    turn.answer.textContent = turn.text = "";
    turn.problem.textContent = "";
    await this.#answer(this.image, turn, options);
  }

  async #answer(image, turn, options = {}) {
    const running = (image.running = new AbortController());
    const isShown = () => this.image === image;
    const wait = (why) => {
      image.status = why;
      if (isShown()) $("status").textContent = why;
    };
    this.#busy(true);
    image.turns.forEach((each) => this.#offer(image, each));
    turn.answer.classList.add("writing");
    turn.answer.setAttribute("aria-busy", "true");
    let words = "";
    try {
      const messages = await messagesOf(image, turn);
      const response = await request("v1/chat/completions", {
        json: { messages, stream: true, ...options },
        signal: running.signal,
        onWait: wait,
      });
      for await (const piece of pieces(response)) {
        turn.text = (turn.text + piece).trimStart();
        turn.answer.textContent = turn.text;
      }
      if (!turn.text) words = "The model generated no answer.";
    } catch (error) {
      words = isAbort(error) ? "Stopped." : error instanceof Refusal ? error.message : `This page failed: ${error}`;
    }
    turn.problem.textContent = words;
    turn.answer.classList.remove("writing");
    turn.answer.removeAttribute("aria-busy");
    image.running = null;
    wait("");
    this.#offer(image, turn);
    if (isShown()) {
      speak(words || turn.text);
      this.#busy(false);
    }
    if (turn.text) this.onAnswer(image);
  }

  /** The buttons of an answer; only the last can be asked again, as later ones depend on it. */
  #offer(image, turn) {
    const about = { class: "plain" };
    const offered = [];
    const isWriting = image.running && turn === image.turns.at(-1);
    if (turn.text && !isWriting) offered.push(copyButton("Copy", () => turn.text, { ...about, "aria-label": `Copy the answer to: ${turn.question}` }));
    if (turn === image.turns.at(-1) && !isWriting) offered.push(button("Ask again", () => !this.running && this.askAgain(turn), { ...about, "aria-label": `Ask again: ${turn.question}` }));
    if (turn.text && this.look && !isWriting) {
      const look = () => this.look({ question: turn.question, answer: turn.text }, turn.text);
      offered.push(button("Where it looks", look, { ...about, "aria-label": `Where it looks for the answer: ${turn.text}` }));
    }
    turn.tools.replaceChildren(...offered);
    if (image === this.image) $("copy-all").hidden = !image.turns.some((each) => each.text && each.tools.childElementCount);
  }

  /** `isOther`: another image is shown, and the focus stays where it is. */
  #busy(isBusy, isOther = false) {
    const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
    $("send").hidden = isBusy;
    $("stop").hidden = !isBusy;
    if (!isOther && (hadFocus || document.activeElement === document.body)) (isBusy && hadFocus ? $("stop") : $("question")).focus({ preventScroll: true });
  }
}

function made(question, text = "") {
  const turn = {
    question,
    text,
    answer: make("p", { class: "said", text }),
    problem: make("p", { class: "problem quiet" }),
    tools: make("div", { class: "turn-tools" }),
  };
  turn.element = make("li", { class: "turn" }, make("p", { class: "asked", text: question }), turn.answer, turn.problem, turn.tools);
  return turn;
}

/** The messages for the server: the image with the first question, then alternating answers and questions. */
async function messagesOf(image, turn) {
  const url = await dataUrl(image.file);
  const said = image.turns.filter((each) => each !== turn && each.text);
  const messages = said.flatMap((each) => [
    { role: "user", content: [{ type: "text", text: each.question }] },
    { role: "assistant", content: each.text },
  ]);
  messages.push({ role: "user", content: [{ type: "text", text: turn.question }] });
  messages[0].content.push({ type: "image_url", image_url: { url } });
  return messages;
}

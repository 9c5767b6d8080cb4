/** Questions and answers about an image, streamed; the earlier ones are sent along. */

import { Refusal, isAbort, pieces, request } from "./api.js";
import { $, button, make, speak } from "./dom.js";
import { dataUrl } from "./image.js";

export class Chat {
  /** `look(fields, what)` shows where the model looks; null where the server does not offer it. */
  constructor(look) {
    this.look = look;
    this.turns = [];
    this.running = null;
    $("ask-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const question = $("question").value.trim();
      if (question && !this.running) this.ask(question);
    });
    $("stop").addEventListener("click", () => this.stop());
  }

  /** A new picture: what was said was about another one. */
  begin(picture) {
    this.stop();
    this.picture = picture;
    this.turns = [];
    $("turns").replaceChildren();
    $("status").textContent = "";
  }

  stop() {
    this.running?.abort();
  }

  async ask(question) {
    $("question").value = "";
    const turn = this.#show(question);
    this.turns.push(turn);
    await this.#answer(turn);
  }

  /** The last question once more; if it was answered, with some chance in the answer. */
  async askAgain(turn) {
    const options = turn.text ? { temperature: 0.7, seed: Math.floor(Math.random() * 2 ** 31) } : {};
    turn.answer.textContent = turn.text = "";
    turn.problem.textContent = "";
    await this.#answer(turn, options);
  }

  async #answer(turn, options = {}) {
    const running = (this.running = new AbortController());
    const { picture } = this;
    this.#busy(true);
    turn.tools.replaceChildren();
    this.turns.forEach((each) => each !== turn && this.#offer(each));
    turn.answer.classList.add("writing");
    turn.answer.setAttribute("aria-busy", "true");
    try {
      const messages = await this.#messages(picture, turn);
      const response = await request("v1/chat/completions", {
        json: { messages, stream: true, ...options },
        signal: running.signal,
        onWait: (why) => ($("status").textContent = why),
      });
      for await (const piece of pieces(response)) {
        turn.text = (turn.text + piece).trimStart();
        turn.answer.textContent = turn.text;
      }
      if (!turn.text) turn.problem.textContent = "The model wrote no answer.";
      speak(turn.text || "The model wrote no answer.");
    } catch (error) {
      const words = isAbort(error) ? "Stopped." : error instanceof Refusal ? error.message : `This page failed: ${error}`;
      turn.problem.textContent = words;
      speak(words);
    } finally {
      turn.answer.classList.remove("writing");
      turn.answer.removeAttribute("aria-busy");
      if (this.running === running) {
        this.running = null;
        $("status").textContent = "";
        this.#busy(false);
        this.#offer(turn);
      }
    }
  }

  /** As the server wants it: the picture with the first question, then answers and questions by turns. */
  async #messages(picture, turn) {
    const url = await dataUrl(picture.file);
    const said = this.turns.filter((each) => each !== turn && each.text);
    const messages = said.flatMap((each) => [
      { role: "user", content: [{ type: "text", text: each.question }] },
      { role: "assistant", content: each.text },
    ]);
    messages.push({ role: "user", content: [{ type: "text", text: turn.question }] });
    messages[0].content.push({ type: "image_url", image_url: { url } });
    return messages;
  }

  #show(question) {
    const turn = {
      question,
      text: "",
      answer: make("p", { class: "said" }),
      problem: make("p", { class: "problem quiet" }),
      tools: make("div", { class: "turn-tools" }),
    };
    turn.element = make("li", { class: "turn" }, make("p", { class: "asked", text: question }), turn.answer, turn.problem, turn.tools);
    $("turns").append(turn.element);
    return turn;
  }

  /** What can be done with an answer; only the last can be asked for again, as those after it lean on it. */
  #offer(turn) {
    const about = { class: "plain" };
    const offered = [];
    if (turn.text) offered.push(button("Copy", (event) => copy(turn.text, event.target), { ...about, "aria-label": `Copy the answer to: ${turn.question}` }));
    if (turn === this.turns.at(-1)) offered.push(button("Ask again", () => !this.running && this.askAgain(turn), { ...about, "aria-label": `Ask again: ${turn.question}` }));
    if (turn.text && this.look) {
      const look = () => this.look({ question: turn.question, answer: turn.text }, turn.text);
      offered.push(button("Where it looks", look, { ...about, "aria-label": `Where it looks for the answer: ${turn.text}` }));
    }
    turn.tools.replaceChildren(...offered);
  }

  #busy(isBusy) {
    const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
    $("send").hidden = isBusy;
    $("stop").hidden = !isBusy;
    if (hadFocus || document.activeElement === document.body) (isBusy && hadFocus ? $("stop") : $("question")).focus({ preventScroll: true });
  }
}

async function copy(text, from) {
  let is = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    is = "Not allowed here";
  }
  from.textContent = is;
  speak(is);
  setTimeout(() => (from.textContent = "Copy"), 2000);
}

/** Scores how well several texts match an image. */

import { isAbort, request } from "./api.js";
import { $, button, make, notice, speak } from "./dom.js";
import { formOf } from "./image.js";

export class Match {
  /** `look` as in Chat. */
  constructor(look) {
    this.look = look;
    this.running = null;
    $("match-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.compare();
    });
    $("texts").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("match-form").requestSubmit();
    });
  }

  begin(image) {
    this.stop();
    this.image = image;
    $("match-status").textContent = "";
    if (image.results) this.#show(image.results);
    else $("matches").hidden = true;
  }

  stop() {
    this.running?.abort();
  }

  async compare() {
    const texts = [...new Set($("texts").value.split("\n").map((line) => line.trim()).filter(Boolean))];
    const tell = (text) => ($("match-status").textContent = text);
    if (!texts.length) {
      tell("Enter a text first.");
      $("texts").focus();
      return;
    }
    this.stop();
    const running = (this.running = new AbortController());
    const { image } = this;
    tell("Comparing…");
    try {
      const response = await request("match", { form: formOf(image, { texts }), signal: running.signal, onWait: (why) => why && tell(why) });
      const { results } = await response.json();
      image.results = results.sort((one, other) => other.itm_probability - one.itm_probability);
      this.#show(image.results);
      tell("");
      speak(`${results[0].text} matches best, ${percent(results[0].itm_probability)}`);
    } catch (error) {
      if (this.running === running) tell("");
      if (!isAbort(error)) notice(error.message, error.canRetry ? () => this.compare() : null);
    } finally {
      if (this.running === running) this.running = null;
    }
  }

  #show(results) {
    $("match-rows").replaceChildren(
      ...results.map((each, place) => {
        const text = make("th", { scope: "row", text: each.text });
        if (this.look) {
          const look = () => this.look({ text: each.text }, each.text);
          text.append(make("br"), button("Where it looks", look, { class: "plain", "aria-label": `Where it looks for: ${each.text}` }));
        }
        return make(
          "tr",
          place === 0 && results.length > 1 ? { class: "best" } : {},
          text,
          bar(percent(each.itm_probability), each.itm_probability, "bar"),
          bar(each.itc_cosine.toFixed(2), Math.max(each.itc_cosine, 0), "bar near"),
        );
      }),
    );
    $("matches").hidden = false;
  }
}

function bar(number, share, name) {
  const filled = make("span");
  filled.style.setProperty("--share", String(share));
  return make("td", {}, make("span", { class: "number", text: number }), make("span", { class: name, "aria-hidden": "true" }, filled));
}

const percent = (share) => `${(share * 100).toFixed(1)} %`;

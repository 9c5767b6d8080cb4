/**
 * Where the model looks: the image is dimmed elsewhere.
 *
 * POST /explain takes the image and `text`, or `question` and `answer`, or `caption` and optionally `word`; it returns
 * `heat`, 0 to 1, as rows of numbers of any size or as a grey image in a data: URL.
 */

import { isAbort, request } from "./api.js";
import { $, button, notice } from "./dom.js";
import { formOf } from "./image.js";

const MAX_SIDE = 512;

export class Look {
  constructor() {
    this.running = null;
    $("strength").addEventListener("input", () => this.#draw());
    $("look-close").addEventListener("click", () => {
      this.hide();
      ($("look-caption").hidden ? $("question") : $("look-caption")).focus();
    });
  }

  begin(image) {
    this.image = image;
    this.hide();
  }

  hide() {
    this.running?.abort();
    $("look").hidden = true;
    $("light").hidden = true;
    this.heat = null;
  }

  /** `caption`: its words are offered as buttons. */
  async show(fields, what, caption = "") {
    this.running?.abort();
    const running = (this.running = new AbortController());
    const tell = (text) => ($("look-what").textContent = text);
    $("look").hidden = false;
    this.#offerWords(caption, fields.word);
    tell(`Looking for “${what}”…`);
    try {
      const response = await request("explain", { form: formOf(this.image, fields), signal: running.signal, onWait: (why) => why && tell(why) });
      const heat = await heatOf((await response.json()).heat);
      if (running.signal.aborted) return;
      this.heat = heat;
      this.#draw();
      tell(heat.values.some((value) => value > 0) ? `Where it looks for “${what}”` : `No part of the image supports “${what}”`);
      $("figure").scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
    } catch (error) {
      if (isAbort(error)) return;
      this.hide();
      notice(error.message, error.canRetry ? () => this.show(fields, what, caption) : null);
    }
  }

  #offerWords(caption, chosen) {
    const held = document.activeElement?.closest("#look-words") ? document.activeElement.textContent : null;
    const words = caption ? [...new Set(caption.match(/[\p{L}\p{N}]+(?:['’-][\p{L}\p{N}]+)*/gu) ?? [])] : [];
    const made = words.map((word) => button(word, () => this.show({ caption, word }, word, caption), { "aria-pressed": String(word === chosen) }));
    $("look-words").replaceChildren(...made);
    made.find((each) => each.textContent === held)?.focus({ preventScroll: true });
  }

  #draw() {
    if (!this.heat) return;
    const { width, height, values } = this.heat;
    const canvas = $("light");
    Object.assign(canvas, { width, height });
    const strength = Number($("strength").value) / 100;
    const dark = new ImageData(width, height);
    values.forEach((value, place) => (dark.data[4 * place + 3] = Math.round(255 * strength * (1 - value))));
    canvas.getContext("2d").putImageData(dark, 0, 0);
    canvas.hidden = false;
  }
}

async function heatOf(given) {
  if (typeof given !== "string") return { width: given[0].length, height: given.length, values: given.flat() };
  const image = new Image();
  image.src = given;
  await image.decode();
  const scale = Math.min(1, MAX_SIDE / Math.max(image.naturalWidth, image.naturalHeight));
  const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  return { width, height, values: Array.from({ length: width * height }, (_, place) => data[4 * place] / 255) };
}

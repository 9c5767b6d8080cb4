/** Captions for all images of the strip, a few at a time, with POST /caption. */

import { isAbort, request } from "./api.js";
import { formOf } from "./image.js";

const AT_ONCE = 3;

export const isPending = ({ state }) => state === "waiting" || state === "running";

/**
 * An image has a `state`: "waiting", "running", "done" with `caption` and `model`, "failed" with `problem` (a
 * sentence) and `canRetry`, or "stopped". `wait` says why it takes longer.
 */
export class Captions {
  /** `onChange(image)` is called when its state changes. */
  constructor(onChange) {
    Object.assign(this, { onChange, queue: [], running: new Map() });
  }

  add(image) {
    image.state = "waiting";
    image.wait = image.problem = "";
    this.queue.push(image);
    this.onChange(image);
    this.#fill();
  }

  /** Caption the image that is shown before the others. */
  prefer(image) {
    if (this.queue.includes(image)) this.queue = [image, ...this.queue.filter((each) => each !== image)];
  }

  /** Forget an image that was removed. */
  drop(image) {
    this.queue = this.queue.filter((each) => each !== image);
    this.running.get(image)?.abort();
  }

  stop() {
    for (const image of this.queue.splice(0)) this.#turn(image, "stopped");
    for (const running of this.running.values()) running.abort();
  }

  #fill() {
    while (this.running.size < AT_ONCE && this.queue.length) this.#caption(this.queue.shift());
  }

  async #caption(image) {
    const running = new AbortController();
    this.running.set(image, running);
    this.#turn(image, "running");
    try {
      const onWait = (why) => {
        image.wait = why;
        this.onChange(image);
      };
      const { text, model } = await (await request("caption", { form: formOf(image), signal: running.signal, onWait })).json();
      Object.assign(image, { caption: text, model });
      this.#end(image, "done");
    } catch (error) {
      Object.assign(image, { problem: error.message, canRetry: error.canRetry });
      this.#end(image, isAbort(error) ? "stopped" : "failed");
    }
    this.#fill();
  }

  #end(image, state) {
    this.running.delete(image);
    this.#turn(image, state);
  }

  #turn(image, state) {
    image.state = state;
    this.onChange(image);
  }
}

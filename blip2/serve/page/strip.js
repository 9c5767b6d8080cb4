/** The strip of images. One of them is shown; arrow keys move to the next. */

import { $, make } from "./dom.js";

const STATES = { waiting: "waiting for its caption", running: "being captioned", failed: "no caption", stopped: "no caption" };

export class Strip {
  /** `onShow(image)`: another image is shown, or null if there is none. `onRemove(image)`: it was removed. */
  constructor({ onShow, onRemove }) {
    Object.assign(this, { onShow, onRemove, images: [], shown: null });
    $("strip").addEventListener("keydown", (event) => {
      const last = this.images.length - 1;
      const place = this.images.indexOf(this.shown);
      const to = { ArrowRight: Math.min(place + 1, last), ArrowLeft: Math.max(place - 1, 0), Home: 0, End: last }[event.key];
      if (event.key === "Delete") this.remove(this.shown);
      else if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      else this.show(this.images[to]);
      event.preventDefault();
      this.focus();
    });
  }

  add(image) {
    image.img = make("img", { src: image.thumbnail, width: "88", height: "88" });
    image.button = make("button", { type: "button" }, image.img);
    image.button.addEventListener("click", () => this.show(image));
    image.item = make("li", {}, image.button);
    this.images.push(image);
    $("strip").append(image.item);
    this.update(image);
    $("many").hidden = this.images.length < 2;
  }

  /** Update an image whose caption has arrived or failed. */
  update(image) {
    image.img.alt = `${image.name}: ${image.caption || STATES[image.state] || "no caption"}`;
    image.button.title = image.img.alt;
    image.button.dataset.state = image.state;
  }

  show(image) {
    this.shown = image;
    for (const each of this.images) {
      each.button.tabIndex = each === image ? 0 : -1;
      each.button.toggleAttribute("aria-current", false);
    }
    if (image) {
      image.button.setAttribute("aria-current", "true");
      image.item.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    this.onShow(image);
  }

  /** Move to the next image, or the previous one (-1), cyclically. */
  step(by) {
    const { length } = this.images;
    if (length > 1) this.show(this.images[(this.images.indexOf(this.shown) + by + length) % length]);
  }

  /** Remove an image; the one after it is shown then, or the last. */
  remove(image) {
    const place = this.images.indexOf(image);
    this.images.splice(place, 1);
    image.item.remove();
    URL.revokeObjectURL(image.url);
    $("many").hidden = this.images.length < 2;
    this.onRemove(image);
    if (image === this.shown) this.show(this.images[place] ?? this.images.at(-1) ?? null);
  }

  /** Focus the shown image, if there is a strip. */
  focus() {
    (this.images.length > 1 ? this.shown.button : $(this.shown ? "another" : "drop")).focus();
  }
}

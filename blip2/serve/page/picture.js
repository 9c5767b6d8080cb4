/** A file that people give -> a picture that the server takes. */

import { Refusal } from "./api.js";

const TAKEN = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MAX_BYTES = 4 * 2 ** 20;
const MAX_SIDE = 2048;

/**
 * `{file, url, name, ratio, note}`: what is sent, what is shown, its width over its height, and what people should know of the difference.
 * Throws a Refusal for what the browser cannot open.
 */
export async function readPicture(file) {
  const name = file.name || "The picture";
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new Refusal(`${name} is no picture that can be opened here. PNG, JPEG, WebP and GIF can.`);
  }
  const ratio = (image.naturalWidth || 1) / (image.naturalHeight || 1);
  if (TAKEN.includes(file.type) && file.size <= MAX_BYTES) return { file, url, name, ratio, note: "" };
  const { blob, width, height } = await redrawn(image, name);
  return { file: blob, url, name, ratio, note: `Sent as a JPEG of ${width} × ${height} pixels.` };
}

/** The same as a JPEG of moderate size: for what is very large, or of a kind that the server does not read. */
async function redrawn(image, name) {
  const [width, height] = [image.naturalWidth || MAX_SIDE, image.naturalHeight || MAX_SIDE];
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  if (!blob) throw new Refusal(`${name} is too large to be drawn here. Give a smaller one.`);
  return { blob, width: canvas.width, height: canvas.height };
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refusal("The picture can no longer be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}

/** A form with the picture and fields; a list becomes a field that is given several times. */
export function formOf(picture, fields = {}) {
  const form = new FormData();
  form.append("image", picture.file, "picture");
  for (const [name, value] of Object.entries(fields)) {
    for (const each of [value].flat()) form.append(name, each);
  }
  return form;
}

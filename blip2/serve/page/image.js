/** Files from the user -> images that the server accepts. */

import { Refusal } from "./api.js";

const TAKEN = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MAX_BYTES = 4 * 2 ** 20;
const MAX_SIDE = 2048;
const THUMBNAIL_SIDE = 176;

/**
 * `{file, url, name, ratio, thumbnail, note}`: what is sent, what is shown, the name, width / height, a small JPEG
 * (data:), and a note if the sent image differs from the shown one.
 * Throws a Refusal if the browser cannot open it.
 */
export async function readImage(file) {
  const name = file.name || "pasted image";
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new Refusal(`${name} is not an image that can be opened here; give a PNG, JPEG, WebP or GIF.`);
  }
  const ratio = (image.naturalWidth || 1) / (image.naturalHeight || 1);
  const thumbnail = drawn(image, THUMBNAIL_SIDE).toDataURL("image/jpeg", 0.8);
  if (TAKEN.includes(file.type) && file.size <= MAX_BYTES) return { file, url, name, ratio, thumbnail, note: "" };
  const canvas = drawn(image, MAX_SIDE);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  if (!blob) {
    URL.revokeObjectURL(url);
    throw new Refusal(`${name} is too large to open here; give a smaller one.`);
  }
  return { file: blob, url, name, ratio, thumbnail, note: `Sent as a JPEG of ${canvas.width} × ${canvas.height} pixels.` };
}

/** A canvas with the image on white, no larger than needed: for very large images, and formats the server does not read. */
function drawn(image, maxSide) {
  const [width, height] = [image.naturalWidth || maxSide, image.naturalHeight || maxSide];
  const scale = Math.min(1, maxSide / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas;
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refusal("The image can no longer be read; choose it again."));
    reader.readAsDataURL(blob);
  });
}

/** A form with the image and fields; a list becomes a repeated field. */
export function formOf(image, fields = {}) {
  const form = new FormData();
  form.append("image", image.file, "image");
  for (const [name, value] of Object.entries(fields)) {
    for (const each of [value].flat()) form.append(name, each);
  }
  return form;
}

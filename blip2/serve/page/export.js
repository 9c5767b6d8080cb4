/** Exports: captions as CSV or JSON, a conversation as Markdown. */

import { button, make, speak } from "./dom.js";

const said = (image) => image.turns.filter((turn) => turn.text);

/** Columns as `blip2 caption` writes them: file_name, text. Images without a caption are left out. */
export function csvOf(images) {
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const rows = images.filter((image) => image.caption).map((image) => [image.name, image.caption]);
  return [["file_name", "text"], ...rows].map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
}

/** All images, with model and conversation; without a caption, `text` is null and `error` says why. */
export function jsonOf(images) {
  const rows = images.map((image) => ({
    file_name: image.name,
    text: image.caption || null,
    ...(image.problem ? { error: image.problem } : {}),
    ...(image.model ? { model: image.model } : {}),
    conversation: said(image).map(({ question, text }) => ({ question, answer: text })),
  }));
  return `${JSON.stringify(rows, null, 2)}\n`;
}

/** The caption, questions and answers as Markdown. Their text is escaped. */
export function markdownOf(image) {
  const plain = (text) => text.replace(/[\\`*_[\]<>#|~&]/g, "\\$&").replace(/^(\s*)([-+=]|\d+[.)])/gm, "$1\\$2");
  const parts = [`**Image:** ${plain(image.name)}`];
  if (image.caption) parts.push(`**Caption:** ${plain(image.caption)}`);
  for (const { question, text } of said(image)) parts.push(`**Question:** ${plain(question)}`, `**Answer:** ${plain(text)}`);
  return `${parts.join("\n\n")}\n`;
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** A button that copies what `text()` returns, and confirms it. */
export function copyButton(words, text, attributes) {
  return button(
    words,
    async ({ currentTarget }) => {
      const told = (await copy(text())) ? "Copied" : "This browser does not allow copying";
      currentTarget.textContent = told;
      speak(told);
      setTimeout(() => (currentTarget.textContent = words), 2000);
    },
    attributes,
  );
}

/** Whether copying was allowed. Plain http:// to another machine only has the old clipboard API. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    focused?.focus({ preventScroll: true });
    return isDone;
  }
}

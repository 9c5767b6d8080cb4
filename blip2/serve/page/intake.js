/** Sources of files: file chooser, camera, clipboard, drag and drop. */

import { $, notice } from "./dom.js";

/** `take(files)` gets the files, always at least one. */
export function receive(take) {
  for (const [press, field] of [["drop", "file"], ["another", "file"], ["camera", "camera-file"]]) {
    $(press).addEventListener("click", () => $(field).click());
  }
  for (const id of ["file", "camera-file"]) {
    $(id).addEventListener("change", ({ target }) => {
      if (target.files.length) take([...target.files]);
      target.value = ""; // the same file may be chosen again
    });
  }

  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    take(files);
  });

  let depth = 0; // number of elements entered: leaving a child is not leaving the window
  const dragging = (step) => {
    depth = step ? Math.max(depth + step, 0) : 0;
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", () => dragging(1));
  document.addEventListener("dragleave", () => dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    dragging(0);
    const { files, hasFolder } = await dropped(event.dataTransfer);
    if (files.length) take(files);
    else if (hasFolder) notice("This folder has no images.");
    else notice("No file was dropped; save the image first, then drop the file here.");
  });
}

/** All dropped files, and of dropped folders the images, by path. */
async function dropped(transfer) {
  const files = [...transfer.files]; // of a folder it has one that cannot be read
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean); // gone after an `await`
  if (!entries.some((entry) => entry.isDirectory)) return { files, hasFolder: false };
  const found = [];
  for (const entry of entries) {
    if (entry.isDirectory) found.push(...(await imagesIn(entry)));
    else found.push(await fileOf(entry));
  }
  return { files: found, hasFolder: true };
}

async function imagesIn(folder) {
  const entries = [];
  const reader = folder.createReader();
  for (let some; (some = await new Promise((done) => reader.readEntries(done, () => done([])))).length; ) entries.push(...some);
  entries.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  const found = [];
  for (const entry of entries) found.push(...(entry.isDirectory ? await imagesIn(entry) : [await fileOf(entry)]));
  return found.filter((file) => file.type.startsWith("image/"));
}

/** An empty file if it cannot be read, so that a notice names it. */
const fileOf = (entry) => new Promise((done) => entry.file(done, () => done(new File([], entry.name))));

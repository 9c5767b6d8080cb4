/** The ways by which files come in: choosing, the camera, pasting, dropping. */

import { $, notice } from "./dom.js";

/** `take(files)` is given what comes, always at least one. */
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

  let depth = 0; // of elements entered: leaving a child is not leaving the window
  const dragging = (step) => {
    depth = step ? Math.max(depth + step, 0) : 0;
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", () => dragging(1));
  document.addEventListener("dragleave", () => dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(0);
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
    else notice("Nothing was dropped that is a file; save the image first, then drop the file here.");
  });
}

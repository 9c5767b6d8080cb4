/** The page: who answers, how images come in, and what happens then. */

import { isAbort, onGone, onKeyNeeded, request, untilReady } from "./api.js";
import { Chat } from "./chat.js";
import { $, button, closeNotice, notice, speak, tryAgain } from "./dom.js";
import { Look } from "./look.js";
import { Match } from "./match.js";
import { formOf, readImage } from "./image.js";

const MINIATURE = {
  things: "dog, cat, horse, bird, fish, rabbit, pig, elephant, turtle, butterfly, apple, banana, car, bus, tree, flower, mushroom, house, bicycle, boat, airplane, ball, umbrella, clock",
  backgrounds: "white, black, gray, green, blue, yellow, pink, purple",
  questions: ["how many dogs are there?", "and cats?", "what color is the background?", "what do you see?"],
  texts: ["two dogs and a boat", "a dog and a boat", "two cats"],
};

const look = new Look();
const chat = new Chat(null);
const match = new Match(null);
let picture = null;
let captioning = null;
let caption = "";

// ---- who answers ----

/** `elapsed` is seen, not announced: it changes all the time. */
function tell(text, elapsed = "", isTrouble = false) {
  if ($("models").textContent !== text) $("models").textContent = text;
  $("elapsed").textContent = elapsed && `(${elapsed} so far)`;
  $("models").classList.toggle("trouble", isTrouble);
  $("models").classList.toggle("writing", text.endsWith("…")); // something is going on
}

/** Whether there is somebody. The first thing that is asked needs the key, so that people are asked for it first. */
async function meet() {
  try {
    const { data } = await (await request("v1/models", { onWait: tell })).json();
    const { paths } = await (await request("openapi.json")).json();
    $("main").hidden = false;
    const does = (what) => data.find((model) => model.capabilities?.includes(what))?.id;
    const [speaker, matcher] = [does("ask") ?? data[0]?.id, does("match")];
    tell(matcher && matcher !== speaker ? `${speaker} answers, ${matcher} compares` : `${speaker} answers`);
    $("tab-match").hidden = !matcher;
    if ("/explain" in paths) {
      chat.look = (fields, what) => look.show(fields, what);
      match.look = matcher ? chat.look : null;
      $("look-caption").hidden = !caption;
    }
    if (speaker === "miniature") introduceMiniature();
    return true;
  } catch (error) {
    if (error.code === "gone") return false;
    tell("No model is answering", "", true);
    notice(error.message, meet);
    return true;
  }
}

let watching = null;

/** The server has gone. When it is back, all is as before, and what the notice offers to try again is tried. */
onGone(() => {
  watching ??= (async () => {
    tell("The server cannot be reached; trying again…", "", true);
    try {
      do await untilReady((why, elapsed) => tell(why, elapsed, true), { isPatient: true });
      while (!(await meet()));
      speak("The server is back.");
      tryAgain();
    } catch (error) {
      tell("No model is answering", "", true);
      notice(error.message, meet);
    }
  })().finally(() => (watching = null));
});

function introduceMiniature() {
  $("knows-things").textContent = MINIATURE.things;
  $("knows-backgrounds").textContent = MINIATURE.backgrounds;
  $("knows").hidden = false;
  $("knows").open = picture === null;
  $("texts").value ||= MINIATURE.texts.join("\n");
  const ask = (question) => {
    if (!chat.running) chat.ask(question);
  };
  $("ideas").replaceChildren(...MINIATURE.questions.map((question) => button(question, () => ask(question))));
  $("ideas").hidden = false;
}

onKeyNeeded((wasWrong) => {
  tell("A key is needed");
  if (!picture) $("main").hidden = true;
  $("key-form").hidden = false;
  $("key").focus();
  if (wasWrong) notice("The server did not accept this key.");
  return new Promise((resolve) => {
    const given = (event) => {
      event.preventDefault();
      $("key-form").removeEventListener("submit", given);
      $("key-form").hidden = true;
      closeNotice();
      const key = $("key").value.trim();
      $("key").value = "";
      resolve(key);
    };
    $("key-form").addEventListener("submit", given);
  });
});

// ---- images come in ----

async function take(file, description = "") {
  if ($("main").hidden) {
    $("key").focus();
    return;
  }
  closeNotice();
  let taken;
  try {
    taken = await readImage(file);
  } catch (error) {
    notice(error.message);
    return;
  }
  if (picture) URL.revokeObjectURL(picture.url);
  picture = taken;
  for (const each of [chat, match, look]) each.begin(picture);
  $("image").src = picture.url;
  $("image").alt = description || `Your image: ${picture.name}`;
  $("sent").textContent = picture.note;
  $("sent").hidden = !picture.note;
  $("figure").style.setProperty("--ratio", String(picture.ratio));
  document.body.classList.add("has-picture");
  for (const id of ["drop", "intro"]) $(id).hidden = true;
  for (const id of ["figure", "work", "another"]) $(id).hidden = false;
  $("knows").open = false;
  // On a phone this would cover half of the picture with a keyboard.
  if (matchMedia("(pointer: fine)").matches && !$("ask").hidden) $("question").focus({ preventScroll: true });
  await describe(description);
}

async function describe(description) {
  captioning?.abort();
  const running = (captioning = new AbortController());
  const say = (text) => ($("caption").textContent = text);
  caption = "";
  say("");
  $("look-caption").hidden = true;
  $("caption").classList.add("writing");
  try {
    const response = await request("caption", { form: formOf(picture), signal: running.signal, onWait: say });
    const { text } = await response.json();
    if (running.signal.aborted) return;
    caption = text;
    say(caption || "The model wrote no caption.");
    if (!description && caption) $("image").alt = `Your image: ${caption}`;
    $("look-caption").hidden = !(chat.look && caption);
  } catch (error) {
    if (captioning !== running) return;
    say("");
    if (!isAbort(error)) notice(error.message, error.canRetry ? () => describe(description) : null);
  } finally {
    if (captioning === running) $("caption").classList.remove("writing");
  }
}

for (const [press, field] of [["drop", "file"], ["another", "file"], ["camera", "camera-file"]]) {
  $(press).addEventListener("click", () => $(field).click());
}
for (const id of ["file", "camera-file"]) {
  $(id).addEventListener("change", ({ target }) => {
    if (target.files[0]) take(target.files[0]);
    target.value = ""; // the same file may be chosen again
  });
}
for (const sample of document.querySelectorAll("[data-sample]")) {
  const show = async () => {
    try {
      const blob = await (await request(`page/${sample.dataset.sample}`)).blob();
      await take(new File([blob], sample.dataset.sample, { type: blob.type }), sample.firstElementChild.alt);
    } catch (error) {
      notice(error.message, error.canRetry ? show : null);
    }
  };
  sample.addEventListener("click", show);
}

document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  take(file);
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
  const [file] = event.dataTransfer.files;
  if (file) take(file);
  else notice("Nothing was dropped that is a file; save the image first, then drop the file here.");
});

// ---- with it ----

$("look-caption").addEventListener("click", () => look.show({ caption }, caption, caption));

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const each of [chat, match]) each.stop();
});

const tabs = [$("tab-ask"), $("tab-match")];
function choose(tab) {
  for (const each of tabs) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = each !== tab;
  }
}
for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const shown = tabs.filter((each) => !each.hidden);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step ? shown[(shown.indexOf(tab) + step + shown.length) % shown.length] : { Home: shown[0], End: shown.at(-1) }[event.key];
    if (!next) return;
    event.preventDefault();
    choose(next);
    next.focus();
  });
}

meet();

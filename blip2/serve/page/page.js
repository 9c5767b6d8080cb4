/** The page: the models, adding images, and the actions on them. */

import { Refusal, onGone, onKeyNeeded, request, untilReady } from "./api.js";
import { Captions, isPending } from "./captions.js";
import { Chat } from "./chat.js";
import { $, button, closeNotice, notice, speak, tryAgain } from "./dom.js";
import { csvOf, download, jsonOf } from "./export.js";
import { History } from "./history.js";
import { readImage } from "./image.js";
import { receive } from "./intake.js";
import { listen } from "./keys.js";
import { Look } from "./look.js";
import { Match } from "./match.js";
import { Strip } from "./strip.js";

const IDEAS = {
  miniature: {
    questions: ["how many dogs are there?", "and cats?", "what color is the background?", "what do you see?"],
    texts: ["two dogs and a boat", "a dog and a boat", "two cats"],
  },
  photographs: {
    questions: ["what do you see?", "is there a fish?", "how many fish are there?"],
    texts: ["a fish", "a hammer", "a koala"],
  },
};

const MAX_IMAGES = 100;

const look = new Look();
const match = new Match(null);
const chat = new Chat((image) => history.save(image));
const captions = new Captions((image) => {
  strip.update(image);
  if (image === strip.shown) showCaption(image);
  if (image.state === "done") history.save(image);
  tellProgress();
});
const strip = new Strip({
  onShow: show,
  onRemove(image) {
    captions.drop(image);
    image.running?.abort();
    tellProgress();
  },
});

const history = new History(async ({ said, id, file, name, ...about }) => {
  const there = strip.images.find((image) => image.id === id);
  if (there) {
    strip.show(there);
  } else {
    await take([new File([file], name, { type: file.type })], { id, ...about, state: "done", said });
  }
  $("see-title").scrollIntoView({ block: "nearest" });
});

// ---- models ----

/** `elapsed` is shown but not announced, since it changes all the time. */
function tell(text, elapsed = "", isTrouble = false) {
  if ($("models").textContent !== text) $("models").textContent = text;
  $("elapsed").textContent = elapsed && `(${elapsed} so far)`;
  $("models").classList.toggle("trouble", isTrouble);
  $("models").classList.toggle("writing", text.endsWith("…")); // in progress
}

/** Waits until a model answers. Asks for the key first, if one is needed. */
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
      if (strip.shown) {
        chat.begin(strip.shown);
        showCaption(strip.shown);
      }
    }
    if (Object.hasOwn(IDEAS, speaker)) introduce(speaker);
    return true;
  } catch (error) {
    if (error.code === "gone") return false;
    tell("No model is answering", "", true);
    notice(error.message, meet);
    return true;
  }
}

let watching = null;

/** The server is down. When it is back, the page continues, and the notice's retry is run. */
onGone(() => {
  watching ??= (async () => {
    tell("The server cannot be reached; trying again…", "", true);
    try {
      do await untilReady((why, elapsed) => tell(why, elapsed, true), { isPatient: true });
      while (!(await meet()));
      speak("The server is back.");
      tryAgain();
      retry();
    } catch (error) {
      tell("No model is answering", "", true);
      notice(error.message, meet);
    }
  })().finally(() => (watching = null));
});

/** What a model of ours knows, and what to ask it. */
function introduce(model) {
  const { questions, texts } = IDEAS[model];
  for (const about of $("knows").querySelectorAll("[data-model]")) about.hidden = about.dataset.model !== model;
  $("knows").hidden = false;
  $("knows").open = strip.shown === null;
  $("texts").value ||= texts.join("\n");
  const ask = (question) => {
    if (!chat.running) chat.ask(question);
  };
  $("ideas").replaceChildren(...questions.map((question) => button(question, () => ask(question))));
  $("ideas").hidden = false;
}

onKeyNeeded((wasWrong) => {
  tell("A key is needed");
  if (!strip.shown) $("main").hidden = true;
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

// ---- adding images ----

/** Add all files that can be opened, and show the first. `about`: what is already known of them. */
async function take(files, about = {}) {
  if ($("main").hidden) {
    $("key").focus();
    return;
  }
  closeNotice();
  const room = MAX_IMAGES - strip.images.length;
  const refused = [];
  let isFirst = true;
  for (const file of files.slice(0, room)) {
    try {
      add({ ...(await readImage(file)), ...about }, isFirst);
      isFirst = false;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      refused.push([error.message, file.name]);
    }
  }
  if (refused.length > 1) notice(`${refused.length} of ${files.length} files are not images that can be opened here, such as ${refused[0][1]}.`);
  else if (refused.length) notice(refused[0][0]);
  if (files.length > room) notice(`At most ${MAX_IMAGES} images fit here; ${files.length - room} were not added.`);
}

/** Add an image: it gets a caption, unless it has one, and its own conversation. */
function add(image, isShown) {
  Object.assign(image, { id: newId(), turns: [], running: null, results: null, ...image });
  if (image.said) chat.restore(image, image.said);
  strip.add(image);
  if (isShown) {
    strip.show(image);
    // On a phone this would cover half of the image with a keyboard.
    if (matchMedia("(pointer: fine)").matches && !$("ask").hidden) $("question").focus({ preventScroll: true });
  }
  if (!image.caption) captions.add(image);
  tellProgress();
}

/** Not a UUID: browsers only make these over https. */
const newId = () => `${Date.now()}-${Math.random().toString(36).slice(2)}`;

function show(image) {
  closeNotice();
  look.hide();
  match.stop();
  document.body.classList.toggle("has-image", Boolean(image));
  for (const id of ["drop", "intro"]) $(id).hidden = Boolean(image);
  for (const id of ["figure", "work", "another", "remove"]) $(id).hidden = !image;
  $("look-caption").hidden = true;
  if (!image) return;
  for (const each of [chat, match, look]) each.begin(image);
  $("image").src = image.url;
  $("sent").textContent = image.note;
  $("sent").hidden = !image.note;
  $("figure").style.setProperty("--ratio", String(image.ratio));
  $("knows").open = false;
  captions.prefer(image);
  showCaption(image);
}

function showCaption(image) {
  const isWaited = isPending(image);
  const text = image.caption || (isWaited ? image.wait : image.state === "done" ? "The model generated no caption." : "");
  if ($("caption").textContent !== text) $("caption").textContent = text; // a change is announced
  $("caption").classList.toggle("writing", isWaited);
  $("image").alt = image.description ?? `Your image: ${image.caption || image.name}`;
  $("look-caption").hidden = !(chat.look && image.caption);
  if (image.state === "failed") notice(image.problem, image.canRetry ? retry : null);
}

/** Retry all captions that failed for a temporary reason. */
function retry() {
  strip.images.filter((image) => image.state === "failed" && image.canRetry).forEach((image) => captions.add(image));
}

function tellProgress() {
  const { images } = strip;
  const [done, pending] = [images.filter((image) => image.state === "done").length, images.some(isPending)];
  const text = `${done} of ${images.length} captions`;
  $("progress").textContent = text;
  Object.assign($("progress-bar"), { max: images.length, value: done, hidden: !pending });
  const hadFocus = [$("captions-stop"), $("captions-go")].includes(document.activeElement);
  $("captions-stop").hidden = !pending;
  $("save-csv").hidden = $("save-json").hidden = !done;
  $("captions-go").hidden = pending || done === images.length;
  const next = [$("captions-stop"), $("captions-go"), strip.shown?.button].find((each) => each && !each.hidden);
  if (hadFocus && next !== document.activeElement) next?.focus(); // the focused button is hidden
  if ($("many").dataset.isPending === "true" && !pending && images.length > 1) speak(`${text} are ready.`);
  $("many").dataset.isPending = String(pending);
}

$("captions-stop").addEventListener("click", () => captions.stop());
$("captions-go").addEventListener("click", () => {
  closeNotice();
  strip.images.filter((image) => ["failed", "stopped"].includes(image.state)).forEach((image) => captions.add(image));
});
$("save-csv").addEventListener("click", () => download("captions.csv", "text/csv", csvOf(strip.images)));
$("save-json").addEventListener("click", () => download("captions.json", "application/json", jsonOf(strip.images)));
$("remove").addEventListener("click", () => {
  strip.remove(strip.shown);
  strip.focus();
});

receive(take);
for (const sample of document.querySelectorAll("[data-sample]")) {
  const name = sample.dataset.sample;
  const open = async () => {
    const there = strip.images.find((image) => image.sample === name);
    if (there) {
      strip.show(there);
      return;
    }
    try {
      const blob = await (await request(`page/${name}`)).blob();
      await take([new File([blob], name, { type: blob.type })], { description: sample.firstElementChild.alt, sample: name });
    } catch (error) {
      notice(error.message, error.canRetry ? open : null);
    }
  };
  sample.addEventListener("click", open);
}

// ---- actions on an image ----

$("look-caption").addEventListener("click", () => {
  const { caption } = strip.shown;
  look.show({ caption }, caption, caption);
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

/** The second tab only exists if there is a matching model. */
function go(tab, field) {
  if ($("work").hidden || tab.hidden) return;
  choose(tab);
  $(field).focus();
}

listen([
  ["?", "show this list", () => $("keys").showModal()],
  ["o", "open images", () => !$("main").hidden && $("file").click()],
  ["n", "next image", () => strip.step(1)],
  ["p", "previous image", () => strip.step(-1)],
  ["/", "ask a question", () => go($("tab-ask"), "question")],
  ["m", "compare texts", () => go($("tab-match"), "texts")],
  ["c", "copy the conversation as Markdown", () => !$("work").hidden && !$("copy-all").hidden && $("copy-all").firstElementChild.click()],
  ["Esc", "stop the answer, or leave the field", () => {
    if (chat.running || match.running) for (const each of [chat, match]) each.stop();
    else document.activeElement.blur();
  }],
  ["← →", "in the strip or the tabs: previous, next", null],
  ["Delete", "in the strip: remove the image", null],
  ["Ctrl Enter", "in the texts: compare", null],
]);

meet();

/**
 * Requests to the server: with the key if one is needed, retries when the server asks to wait, and errors as sentences.
 *
 * Paths are relative to the page, so that it works wherever a proxy shows it.
 */

const BUSY_TRIES = 8;
const KEY = "blip2-key";
const LOADING = "The model is loading…";
const AWAY_S = 2;

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // No session storage: the key lasts until the page is closed.
}
let whenGone = () => {};
let askForKey = () => Promise.reject(new Refusal("This server needs a key."));
let keyAsked = null;

/** A failed action, with a sentence for the user. */
export class Refusal extends Error {
  constructor(message, { status = 0, code = "", canRetry = false } = {}) {
    super(message);
    Object.assign(this, { status, code, canRetry });
  }
}

export const isAbort = (error) => error?.name === "AbortError";

/** `ask` shows a field and resolves to what was typed; called on a 401 response. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** `heard` is called when the server no longer answers. */
export function onGone(heard) {
  whenGone = heard;
}

/**
 * A successful response. Sends `json` or `form`. `onWait` gets a sentence when it takes longer, and for how long so far
 * if the server reports it ("12 s"); and "" when the wait is over.
 * Throws a Refusal, or an AbortError on `signal`.
 */
export async function request(path, { json, form, signal, onWait = () => {} } = {}) {
  for (let tries = 1; ; tries++) {
    const keyUsed = key;
    const headers = keyUsed ? { Authorization: `Bearer ${keyUsed}` } : {};
    if (json) headers["Content-Type"] = "application/json";
    const body = json ? JSON.stringify(json) : form;
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
    } catch (error) {
      throw isAbort(error) ? error : await gone(Boolean(body));
    }
    if (response.status !== 401) keep(keyUsed);
    if (response.ok) {
      onWait("");
      return response;
    }
    const told = await errorOf(response);
    if (isAway(response, told)) throw away();
    if (response.status === 401) {
      if (key === keyUsed) await newKey(Boolean(keyUsed));
    } else if (told.code === "loading") {
      onWait(LOADING, elapsed(response));
      await sleep(secondsOf(response), signal);
      await untilReady(onWait, { signal });
    } else if (isForNow(response) && tries < BUSY_TRIES) {
      const seconds = secondsOf(response);
      onWait(`${response.status === 429 ? "The server is busy" : "The server is not available"}; trying again in ${seconds} s…`);
      await sleep(seconds, signal);
    } else {
      throw refusal(response.status, told);
    }
  }
}

/** Resolves when the server can answer. `isPatient`: also waits for a server that is down. */
export async function untilReady(onWait, { signal, isPatient = false } = {}) {
  for (;;) {
    let response = null;
    try {
      response = await fetch("ready", { signal });
    } catch (error) {
      if (isAbort(error)) throw error;
      if (!isPatient) throw await gone(false);
    }
    if (response?.ok) return;
    const told = response ? await errorOf(response) : {};
    if (response && !isAway(response, told)) {
      if (told.code !== "loading") throw refusal(response.status, told);
      onWait(LOADING, elapsed(response));
      await sleep(secondsOf(response), signal);
    } else if (isPatient) {
      onWait("The server cannot be reached; trying again…");
      await sleep(AWAY_S, signal);
    } else {
      throw away();
    }
  }
}

/** The pieces of text of a streamed answer, as they arrive. */
export async function* pieces(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read().catch(async (error) => {
      throw isAbort(error) ? error : Object.assign(await gone(false), { message: "The answer was interrupted because the server cannot be reached." });
    });
    if (done) throw new Refusal("The answer was interrupted; ask again.", { canRetry: true });
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw refusal(chunk.error.code === "deadline" ? 504 : 500, chunk.error);
      const text = chunk.choices[0]?.delta.content;
      if (text) yield text;
    }
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error ?? {};
  } catch {
    return {};
  }
}

function refusal(status, { code = "", message = "" }) {
  const byStatus = {
    413: "This image is too large for this server; give a smaller one.",
    415: "This file is not an image that the server can read; give a PNG, JPEG, WebP or GIF.",
    429: `The server is busy and refused this ${BUSY_TRIES} times; try again in a moment.`,
    503: "The server is not available; try again in a moment.",
    504: "The answer took longer than this server allows; try again later.",
  };
  const byCode = {
    invalid_image: "The server cannot read this image; the file may be damaged.",
    model_failed: "The model could not be loaded; see the server's log.",
    model_stopped: "The model has stopped; the server has to be restarted.",
  };
  const sentence = byCode[code] ?? byStatus[status] ?? `The server refused this: ${message || `error ${status}`}`;
  return new Refusal(sentence, { status, code, canRetry: status === 429 || status >= 500 });
}

/** Why there was no response. A server that refuses a large body may close the connection before it is sent. */
async function gone(hadBody) {
  const isThere = await fetch("health").then((response) => response.ok, () => false);
  if (!isThere) return away();
  const message = hadBody ? "The connection was lost while sending; the image may be too large for this server." : "The connection was lost; try again.";
  return new Refusal(message, { canRetry: true });
}

function away() {
  whenGone();
  return new Refusal("The server cannot be reached; check that it is running.", { code: "gone", canRetry: true });
}

/** The server is stopping, or a proxy answers for it. */
const isAway = (response, told) => told.code === "stopping" || (!told.code && [502, 503, 504].includes(response.status));

/** Refused, with a time after which to retry. */
const isForNow = (response) => response.status === 429 || (response.status === 503 && response.headers.has("Retry-After"));

/** How long the model has been loading and how much of it is there, as far as the server knows, or "". */
function elapsed(response) {
  const seconds = response.headers.get("X-Blip2-Loading-Seconds");
  const percent = response.headers.get("X-Blip2-Loading-Percent");
  return [seconds && `${seconds} s`, percent && `${percent} %`].filter(Boolean).join(", ");
}

async function newKey(wasWrong) {
  keyAsked ??= (async () => {
    let given = await askForKey(wasWrong);
    while (!/^[!-~]+$/.test(given)) given = await askForKey(true); // not possible in a header
    return given;
  })().finally(() => (keyAsked = null));
  key = await keyAsked;
}

/** Keep the key for this tab, once the server has accepted it. */
function keep(taken) {
  try {
    if (taken) sessionStorage.setItem(KEY, taken);
  } catch {
    // as above
  }
}

const secondsOf = (response) => Math.min(Number(response.headers.get("Retry-After")) || 1, 30);

function sleep(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
  });
}

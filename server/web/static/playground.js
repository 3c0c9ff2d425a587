// The conversation: what is sent, what comes back, and how fast.

import { hasKey, stream } from "./api.js";
import { render } from "./answer.js";
import { byId, element, fillSelect } from "./dom.js";
import { count, seconds } from "./format.js";
import { asCurl, asPython } from "./snippets.js";

const EXAMPLES = [
  "What is the capital of France?",
  "Explain in three sentences why the sky is blue.",
  "Write a Python function that reverses a list.",
];
const FINISHES = { stop: "", length: "max tokens" };

let messages = [];
let lastSent = null;
let running = null;
let onUnauthorized = () => {};

export function startPlayground(unauthorized) {
  onUnauthorized = unauthorized;
  byId("examples").append(...EXAMPLES.map((text) => element("button", { type: "button", class: "quiet", textContent: text, onclick: () => send(text) })));
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(byId("prompt").value);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clear);
  byId("code").addEventListener("click", showCode);
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", showMode);
  byId("model").addEventListener("change", noteModel);
  const wide = matchMedia("(min-width: 900px)");
  const unfold = () => { byId("settings").open = wide.matches; };
  wide.addEventListener("change", unfold);
  unfold();
  startCodeDialog();
}

// Models as the server lists them, with their state.
export function showModels(models) {
  const states = new Map(models.map((model) => [model.name, model.state]));
  fillSelect(byId("model"), [...states.keys()]);
  for (const option of byId("model").options) {
    const state = states.get(option.value);
    option.textContent = state === "ready" ? option.value : `${option.value} (${state})`;
  }
  noteModel();
}

function noteModel() {
  byId("settings-note").textContent = byId("model").value;
}

function isChat() {
  return document.querySelector("input[name=mode]:checked").value === "chat";
}

function showMode() {
  byId("system-field").hidden = !isChat();
  byId("prompt").placeholder = isChat() ? "Write a message" : "Write a text that the model goes on with";
}

// --- the request

function requestFor(text) {
  const body = { model: byId("model").value };
  if (isChat()) {
    const system = byId("system").value.trim();
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...messages, { role: "user", content: text }];
  } else {
    body.prompt = text;
  }
  for (const id of ["max_tokens", "temperature", "top_p", "top_k", "seed"]) {
    if (byId(id).value !== "" && byId(id).checkValidity()) body[id] = Number(byId(id).value);
  }
  if (byId("stop_text").value) body.stop = byId("stop_text").value;
  if (byId("priority").value) body.priority = byId("priority").value;
  body.stream = true;
  body.stream_options = { include_usage: true, include_timings: true };
  return { path: isChat() ? "/v1/chat/completions" : "/v1/completions", body };
}

async function send(text) {
  if (!text.trim() || running) return;
  if (!document.querySelector(".fields :invalid")) {
    const request = requestFor(text);
    lastSent = request;
    byId("welcome").hidden = true;
    byId("prompt").value = "";
    await answer(text, request);
  } else {
    byId("settings").open = true;
    document.querySelector(".fields :invalid").reportValidity();
  }
}

async function answer(text, { path, body }) {
  const turn = new Turn(text, body.model);
  running = new AbortController();
  showBusy(true);
  try {
    for await (const chunk of stream(path, body, running.signal)) turn.take(chunk);
    turn.end();
  } catch (error) {
    if (error.name === "AbortError") turn.end("stopped");
    else turn.fail(error);
    if (error.status === 401) onUnauthorized();
  } finally {
    running = null;
    showBusy(false);
  }
  if (body.messages && turn.text) {
    messages.push({ role: "user", content: text }, { role: "assistant", content: turn.text });
  }
}

function showBusy(busy) {
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
  byId("clear").disabled = busy;
  (busy ? byId("stop") : byId("prompt")).focus({ preventScroll: true });
}

function clear() {
  messages = [];
  byId("turns").replaceChildren(byId("welcome"));
  byId("welcome").hidden = false;
  byId("prompt").focus();
}

// --- one question and its answer

class Turn {
  text = "";
  #thought = "";
  #began = performance.now();
  #first = null;
  #events = 0;
  #finish = null;
  #usage = null;
  #timings = null;
  #drawing = false;

  constructor(question, model) {
    this.#body = element("div", { class: "answer-text" });
    this.#facts = element("dl", { class: "facts" });
    this.#answer = element("article", { class: "answer busy", "aria-busy": "true" },
      element("div", { class: "who", textContent: model }), this.#body, this.#facts);
    byId("turns").append(element("div", { class: "question", textContent: question }), this.#answer);
    this.#scroll(true);
  }

  #body;
  #facts;
  #answer;

  take(chunk) {
    const choice = chunk.choices[0];
    this.#usage = chunk.usage ?? this.#usage;
    this.#timings = chunk.timings ?? this.#timings;
    if (!choice) return;
    this.#finish = choice.finish_reason ?? this.#finish;
    const content = choice.delta?.content ?? choice.text ?? "";
    const thought = choice.delta?.reasoning_content ?? "";
    if (!content && !thought) return;
    this.#first ??= performance.now();
    this.#events += 1;
    this.text += content;
    this.#thought += thought;
    if (!this.#drawing) {
      this.#drawing = true;
      requestAnimationFrame(() => this.#draw());
    }
  }

  end(how) {
    this.#close();
    this.#showFacts(how ?? FINISHES[this.#finish] ?? this.#finish);
  }

  fail(error) {
    this.#close();
    const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    this.#answer.append(element("p", { class: "error", role: "alert", textContent: error.message + again }));
  }

  #close() {
    this.#answer.classList.remove("busy");
    this.#answer.setAttribute("aria-busy", "false");
    this.#draw();
  }

  #draw() {
    this.#drawing = false;
    const bottom = this.#isAtBottom();
    const thought = this.#thought
      ? [element("details", { class: "thought", open: !this.text }, element("summary", { textContent: "Reasoning" }), element("p", { textContent: this.#thought }))]
      : [];
    this.#body.replaceChildren(...thought, ...render(this.text));
    if (this.#answer.classList.contains("busy")) this.#showFacts();
    this.#scroll(bottom);
  }

  #showFacts(how) {
    const now = performance.now();
    const facts = [];
    if (this.#first !== null) {
      facts.push(["first token", seconds((this.#first - this.#began) / 1000), "From Send to the first token, seen from this page"]);
      facts.push(["speed", this.#speed(now), "Tokens after the first, by the time that they took"]);
    }
    if (this.#usage) facts.push(["tokens", `${count(this.#usage.prompt_tokens)} in, ${count(this.#usage.completion_tokens)} out`, "Prompt and answer"]);
    if (this.#timings) {
      const { batch_mean: mean, batch_max: most, queue_ms: queue } = this.#timings;
      facts.push(["batch", most > 1 ? `${count(mean)} (max ${most})` : "alone", "Sequences in the steps that made this answer"]);
      facts.push(["queued", seconds(queue / 1000), "Before the first step"]);
    }
    if (how) facts.push(["ended", how, "Why the answer ends here"]);
    this.#facts.replaceChildren(...facts.map(([name, value, title]) =>
      element("div", { title }, element("dt", { textContent: name }), element("dd", { textContent: value }))));
  }

  // While it streams by events, which may hold several tokens; then exactly, by the server's clock.
  #speed(now) {
    if (this.#timings && this.#usage) {
      const took = (this.#timings.total_ms - this.#timings.ttft_ms) / 1000;
      const later = this.#usage.completion_tokens - 1;
      return later > 0 && took > 0 ? `${count(later / took)} tokens/s` : "–";
    }
    const took = (now - this.#first) / 1000;
    return this.#events > 2 && took > 0 ? `≈ ${count((this.#events - 1) / took)} tokens/s` : "…";
  }

  #isAtBottom() {
    const view = byId("turns");
    return view.scrollHeight - view.scrollTop - view.clientHeight < 80;
  }

  #scroll(wanted) {
    if (wanted) byId("turns").scrollTop = byId("turns").scrollHeight;
  }
}

// --- code

let language = "curl";

function showCode() {
  const text = byId("prompt").value;
  const { path, body } = text.trim() || !lastSent ? requestFor(text || "Hello!") : lastSent;
  const shown = { ...body };
  delete shown.stream_options;
  const write = language === "curl" ? asCurl : asPython;
  byId("code-text").textContent = write(location.origin, path, shown, hasKey());
  if (!byId("code-dialog").open) byId("code-dialog").showModal();
}

function startCodeDialog() {
  for (const tab of document.querySelectorAll("[data-language]")) {
    tab.addEventListener("click", () => {
      language = tab.dataset.language;
      for (const each of document.querySelectorAll("[data-language]")) each.setAttribute("aria-pressed", String(each === tab));
      showCode();
    });
  }
  byId("copy").addEventListener("click", copy);
}

async function copy() {
  const source = byId("code-text");
  getSelection().selectAllChildren(source);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    document.execCommand("copy"); // a page without TLS from another machine has no clipboard of its own
  }
  byId("copy").textContent = "Copied";
  setTimeout(() => { byId("copy").textContent = "Copy"; }, 1500);
}

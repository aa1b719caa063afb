// The page: a conversation, its answers as they come, and the list of those that this browser keeps.

import { copy, show } from "./markdown.js";
import * as store from "./store.js";

const $ = id => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"];
let talk = store.create(); // the one that is shown
let running = null; // ends the answer that comes

// An element with its class and what is in it.
function make(name, className, ...content) {
  const element = document.createElement(name);
  element.className = className;
  element.append(...content);
  return element;
}

function button(className, text, press) {
  const made = make("button", className, text);
  made.type = "button";
  made.addEventListener("click", press);
  return made;
}

// For who listens and does not look.
function say(text) {
  $("said").textContent = text;
}

async function copied(source, text) {
  try {
    await copy(text);
    say("복사했습니다 · Copied");
    source.textContent = "복사됨 · Copied";
  } catch (error) {
    say(error.message);
    source.textContent = "복사 안 됨 · Not copied";
  }
  setTimeout(() => { source.textContent = "복사 · Copy"; }, 1500);
}

// ---- what is shown ----

// A message of `talk` as an element; `at` is its place in it.
function shown(message, at) {
  const mine = message.role === "user";
  const article = make("article", "message from-" + message.role), tools = make("div", "tools");
  const text = make("div", mine ? "user" : "answer"), note = make("span", "note");
  article.setAttribute("aria-label", mine ? "나 · You" : "아오지 · aoji");
  if (mine) text.textContent = message.content;
  else show(text, message.content);
  note.textContent = message.note ?? "";
  note.classList.toggle("error", !!message.failed);
  if (mine) tools.append(button("edit-question", "고치기 · Edit", () => edit(article, at)));
  else tools.append(note);
  if (!mine && message.content) {
    const whole = button("copy", "복사 · Copy", () => copied(whole, message.content));
    tools.append(whole);
  }
  if (!mine && at === talk.messages.length - 1 && !running) {
    tools.append(button("retry", "다시 · Retry", () => { talk.messages.splice(at); answer(); }));
  }
  article.append(text, tools);
  return article;
}

const atEnd = () => $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
const toEnd = () => { $("talk").scrollTop = $("talk").scrollHeight; };

function showTalk() {
  $("talk").replaceChildren(...talk.messages.map(shown));
  toEnd();
}

function showList() {
  $("talks").replaceChildren(...store.list().map(each => {
    const title = each.messages[0].content.slice(0, 60), open = button("open", title, () => { location.hash = each.id; menu(false); });
    const forget = button("remove", "×", () => {
      if (!confirm(`지울까요? Delete?\n\n${title}`)) return;
      if (each.id === talk.id) { talk.removed = true; store.remove(each.id); begin(); }
      else { store.remove(each.id); showList(); }
    });
    forget.setAttribute("aria-label", "지우기 · Delete: " + title);
    if (each.id === talk.id) open.setAttribute("aria-current", "true");
    return make("li", "", open, forget);
  }));
}

function menu(open) {
  $("side").classList.toggle("shown", open);
  $("menu").setAttribute("aria-expanded", open);
  if (open) $("clear").focus();
}

function idle() {
  running = null;
  $("send").textContent = "보내기 · Send";
}

function stop() {
  running?.abort();
  idle();
}

// Another conversation comes into view; an answer that runs in the last one ends.
function open(next) {
  stop();
  talk = next;
  showTalk();
  showList();
}

function begin() {
  history.replaceState(null, "", location.pathname + location.search);
  open(store.create());
  menu(false);
  $("question").focus();
}

// The conversation that the address names, so that reloading and going back find it.
function addressed() {
  const id = location.hash.slice(1);
  if (id !== talk.id || !talk.messages.length) open(store.load(id) ?? store.create());
}

// ---- the server ----

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) };
}

// The data of each server-sent event of a reply, however the network cuts it.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter(l => l.startsWith("data:")).map(l => l.slice(5).trimStart()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// The request for the next answer. Questions that got none are not asked again with the next one.
function request() {
  const system = $("system").value.trim(), said = talk.messages.filter(m => m.role === "user" || m.content);
  const messages = said.filter((m, i) => m.role !== "user" || said[i + 1]?.role !== "user");
  const numbers = NUMBERS.filter(id => $(id).value !== "").map(id => [id, Number($(id).value)]);
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages.map(({ role, content }) => ({ role, content }))],
    ...Object.fromEntries(numbers),
    stream: true, stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

// Why a reply is an error, which a gateway may have sent in a form of its own.
async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText} ${text.slice(0, 300)}`;
  }
}

// Asks for an answer to the conversation as it stands and shows it as it comes.
async function answer() {
  const own = talk, body = request(), control = running = new AbortController();
  const message = { role: "assistant", content: "", note: "…" };
  own.messages.push(message);
  store.save(own);
  location.hash = own.id;
  showTalk();
  showList();
  $("send").textContent = "멈추기 · Stop";
  const article = $("talk").lastElementChild, text = article.querySelector(".answer"), note = article.querySelector(".note");
  article.setAttribute("aria-busy", "true"); // read out when it is whole
  let tokens = 0, first = 0, timings = null, reason = null, frame = 0;
  const speed = () => {
    const seconds = (performance.now() - first) / 1e3;
    const rate = timings ? timings.decode_tps : tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0;
    return `${tokens} tokens · ${rate.toFixed(1)} tok/s` + (timings ? ` · 첫 토큰 TTFT ${timings.ttft_ms.toFixed(0)} ms` : "");
  };
  const draw = () => {
    frame = 0;
    const end = atEnd();
    show(text, message.content);
    note.textContent = speed();
    if (end) toEnd();
  };
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: control.signal });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const event of events(response)) {
      control.signal.throwIfAborted(); // what came before the button was pressed may be much
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      if (event.timings) timings = event.timings;
      reason = event.choices[0]?.finish_reason ?? reason;
      const piece = event.choices[0]?.delta?.content;
      if (piece) {
        first ||= performance.now();
        message.content += piece;
      }
      frame ||= requestAnimationFrame(draw);
    }
    if (!reason) throw new Error("연결이 끊어졌습니다 · the connection ended in the middle of the answer");
    message.note = speed() + (reason === "length" ? " · 길이 제한 length" : "");
  } catch (error) {
    message.failed = error.name !== "AbortError";
    message.note = message.failed ? error.message : speed() + " · 멈춤 stopped";
  }
  cancelAnimationFrame(frame);
  store.save(own);
  if (running === control) idle();
  if (own !== talk) return;
  const end = atEnd();
  article.replaceWith(shown(message, own.messages.indexOf(message)));
  if (end) toEnd();
  say(message.failed ? message.note : message.content);
}

function ask(question) {
  stop();
  talk.messages.push({ role: "user", content: question });
  answer();
}

// A question is written anew; what came after it goes.
function edit(article, at) {
  const field = make("textarea", ""), form = make("form", "edit");
  const close = () => { form.replaceWith(shown(talk.messages[at], at)); $("talk").children[at].querySelector("button").focus(); };
  field.value = talk.messages[at].content;
  field.setAttribute("aria-label", "질문 고치기 · Edit the question");
  form.append(field, button("cancel", "취소 · Cancel", close), make("button", "main", "다시 묻기 · Ask again"));
  form.addEventListener("submit", e => {
    e.preventDefault();
    const question = field.value.trim();
    if (!question) return;
    stop();
    talk.messages.splice(at);
    ask(question);
    $("question").focus();
  });
  field.addEventListener("keydown", e => {
    if (e.key === "Escape" && !composing(e)) close();
    submits(e, form);
  });
  article.replaceWith(form);
  field.focus();
}

// ---- keys and buttons ----

// While a Hangul syllable is being composed, Enter ends it and sends nothing. Safari ends it before its Enter comes, which has 229 then.
const composing = e => e.isComposing || e.keyCode === 229;

function submits(e, form) {
  if (e.key !== "Enter" || e.shiftKey || composing(e)) return;
  e.preventDefault();
  if (!running || form !== $("form")) form.requestSubmit();
}

$("form").addEventListener("submit", e => {
  e.preventDefault();
  if (running) return stop();
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", e => {
  if (e.key === "Escape" && !composing(e)) stop();
  submits(e, $("form"));
});
$("clear").addEventListener("click", begin);
$("menu").addEventListener("click", () => menu(!$("side").classList.contains("shown")));
$("page").addEventListener("click", e => { if (e.target !== $("menu")) menu(false); });
$("side").addEventListener("keydown", e => { if (e.key === "Escape") { menu(false); $("menu").focus(); } });
$("talk").addEventListener("click", e => {
  const source = e.target.closest(".copy-code");
  if (source) copied(source, source.closest("figure").querySelector("code").textContent.replace(/\n$/, ""));
});

const models = () => fetch("v1/models", { headers: headers() }).then(r => r.json())
  .then(list => { $("model").textContent = list.data ? list.data[0].id : "API key?"; }).catch(() => {});
$("key").addEventListener("change", () => { store.keepKey($("key").value); models(); });
$("settings").addEventListener("change", () => {
  store.keep(Object.fromEntries([...NUMBERS, "system"].map(id => [id, $(id).value])));
});
for (const [id, value] of Object.entries(store.settings())) {
  if ([...NUMBERS, "system"].includes(id)) $(id).value = value;
}
$("key").value = store.key();

addEventListener("storage", showList); // another tab has said something
addEventListener("hashchange", addressed);
addEventListener("pagehide", () => store.save(talk));
addressed();
models();

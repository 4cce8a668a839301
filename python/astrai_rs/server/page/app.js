/** The chat page: one conversation with the server that this page came from. */

import { element, render } from "./markdown.js";

/**
 * @typedef {{role: "user" | "assistant", content: string, reasoning?: string, note?: string, error?: string}} Message
 */

const $ = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];

/** @type {Message[]} */
let messages = JSON.parse(localStorage.getItem("messages") ?? "[]");
/** @type {AbortController | null} */
let running = null;

/** An answer of the server that is not 200. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// --- The server ------------------------------------------------------------------------------------

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const method = body ? "POST" : "GET";
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, error?.message ?? `the server answered ${answer.status}`);
}

/** The data of server-sent events. @param {Response} answer */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request() {
  const sent = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  if ($("system").value) sent.unshift({ role: "system", content: $("system").value });
  const body = { messages: sent, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  return body;
}

/** Ask for an answer to the conversation as it stands, and show it as it comes. */
async function ask() {
  const body = request();
  /** @type {Message} */
  const answer = { role: "assistant", content: "" };
  messages.push(answer);
  running = new AbortController();
  draw();
  say("Answering");
  const start = performance.now();
  let first = 0;
  let tokens = 0;
  try {
    for await (const event of events(await call("/v1/chat/completions", body, running.signal))) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (!first && (delta.content || delta.reasoning_content)) first = performance.now();
      answer.content += delta.content ?? "";
      if (delta.reasoning_content) answer.reasoning = (answer.reasoning ?? "") + delta.reasoning_content;
      tokens = event.usage?.completion_tokens ?? tokens;
      drawLast();
    }
    say("Answer complete");
  } catch (error) {
    if (error.name === "AbortError") answer.note = "stopped";
    else fail(answer, error);
  }
  running = null;
  if (tokens > 1 && first) answer.note = speed(tokens, first - start, performance.now() - first);
  save();
  draw();
  $("input").focus();
}

function speed(tokens, wait, span) {
  return `${tokens} tokens · ${(((tokens - 1) * 1000) / span).toFixed(1)} tokens/s · first after ${Math.round(wait)} ms`;
}

function fail(answer, error) {
  answer.error = error.message;
  say(`Error: ${error.message}`);
  if (error.status === 401) wantKey(error.message);
}

function wantKey(message) {
  toggleSettings(true);
  $("key-note").hidden = false;
  $("key-note").textContent = `The server wants an API key: ${message}`;
  $("key").focus();
}

async function showModel() {
  try {
    const { data } = await (await call("/v1/models")).json();
    $("model").textContent = data[0].id;
    $("key-note").hidden = true;
  } catch (error) {
    $("model").textContent = error.status === 401 ? "API key needed" : "no connection";
    if (error.status === 401) wantKey(error.message);
  }
}

// --- The page --------------------------------------------------------------------------------------

function draw() {
  const box = $("messages");
  box.replaceChildren(...messages.map(card));
  if (!messages.length) box.append(element("p", { class: "empty" }, "Ask something. The conversation stays in this browser."));
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  box.scrollTop = box.scrollHeight;
}

/** Redraw the answer that is being written; follow it unless the reader has scrolled up. */
function drawLast() {
  const box = $("messages");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  box.lastElementChild.replaceWith(card(messages.at(-1), messages.length - 1));
  if (follows) box.scrollTop = box.scrollHeight;
}

/** @param {Message} message @param {number} index */
function card(message, index) {
  const isUser = message.role === "user";
  const isOpen = running !== null && index === messages.length - 1;
  const node = element("article", { class: message.role, "aria-label": isUser ? "You" : "Model" });
  if (message.reasoning) {
    const details = element("details", {}, element("summary", {}, "Reasoning"), message.reasoning);
    details.open = isOpen && !message.content;
    node.append(details);
  }
  const text = isUser ? [message.content] : render(message.content);
  node.append(element("div", { class: isOpen ? "body waiting" : "body" }, ...text));
  if (message.error) node.append(element("p", { class: "error", role: "alert" }, message.error));
  if (!isOpen) node.append(foot(message, index));
  return node;
}

function foot(message, index) {
  const bar = element("div", { class: "foot" });
  if (message.note) bar.append(element("span", {}, message.note));
  bar.append(button("Copy", () => navigator.clipboard?.writeText(message.content)));
  if (message.role === "user") bar.append(button("Edit", () => edit(index)));
  else bar.append(button("Retry", () => resend(index)));
  return bar;
}

function button(label, action) {
  const node = element("button", { type: "button" }, label);
  node.addEventListener("click", action);
  return node;
}

/** Change a message of the user's; sending it drops what followed. */
function edit(index) {
  if (running) return;
  const field = element("textarea", { class: "edit", rows: "3", "aria-label": "Edit message" });
  field.value = messages[index].content;
  const send = () => {
    messages = [...messages.slice(0, index), { role: "user", content: field.value }];
    ask();
  };
  const place = $("messages").children[index];
  place.replaceChildren(field, element("div", { class: "foot" }, button("Send", send), button("Cancel", draw)));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") draw();
    else onEnter(event, send);
  });
  field.focus();
}

function resend(index) {
  if (running) return;
  messages = messages.slice(0, index);
  ask();
}

function onEnter(event, action) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    action();
  }
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow();
  messages.push({ role: "user", content: text });
  ask();
}

function grow() {
  $("input").rows = Math.min(8, $("input").value.split("\n").length);
}

function say(text) {
  $("status").textContent = text;
}

function toggleSettings(open) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
}

function save() {
  localStorage.setItem("messages", JSON.stringify(messages));
  for (const name of FIELDS) localStorage.setItem(name, $(name).value);
  sessionStorage.setItem("key", $("key").value);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function restore() {
  for (const name of FIELDS) $(name).value = localStorage.getItem(name) ?? $(name).value;
  $("key").value = sessionStorage.getItem("key") ?? "";
  setTheme(localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("input").addEventListener("keydown", (event) => onEnter(event, send));
  $("input").addEventListener("input", grow);
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("new").addEventListener("click", () => {
    running?.abort();
    messages = [];
    save();
    draw();
    $("input").focus();
  });
  $("settings-toggle").addEventListener("click", () => toggleSettings($("settings").hidden));
  $("settings").addEventListener("change", save);
  $("key").addEventListener("change", showModel);
  $("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", theme);
    setTheme(theme);
  });
}

restore();
listen();
draw();
showModel();
$("input").focus();

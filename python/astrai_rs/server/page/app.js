"use strict";
/** The chat page: one conversation with the server that this page came from. */

import { copyButton, element, render } from "./markdown.js";

/**
 * @typedef {object} Message
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} [reasoning]
 * @property {string} [note] how the answer went: its tokens and times, or why it is not whole
 * @property {string} [error]
 */

const $ = (id) => document.getElementById(id);
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const FIELDS = ["system", ...SAMPLING];

/** @type {Message[]} */
let messages = [];
/** @type {AbortController | null} */
let running = null;
/** @type {string | undefined} */
let model;

// --- What the browser keeps ------------------------------------------------------------------------

/** @returns {any} what was stored; `undefined` without it, or where it is not readable */
function load(name) {
  try {
    return JSON.parse(localStorage.getItem(`astrai_rs.${name}`)) ?? undefined;
  } catch {
    return undefined;
  }
}

function store(name, value) {
  try {
    localStorage.setItem(`astrai_rs.${name}`, JSON.stringify(value));
  } catch {
    say("The browser does not keep this conversation: its storage is full or off");
  }
}

function saveMessages() {
  store("messages", messages);
}

function saveSettings() {
  store("settings", Object.fromEntries(FIELDS.map((name) => [name, $(name).value])));
  sessionStorage.setItem("astrai_rs.key", $("key").value);
}

function restore() {
  const isMessage = (each) => ["user", "assistant"].includes(each?.role) && typeof each.content === "string";
  const kept = load("messages");
  messages = Array.isArray(kept) ? kept.filter(isMessage) : [];
  const settings = load("settings") ?? {};
  for (const name of FIELDS) $(name).value = settings[name] ?? $(name).value;
  $("key").value = sessionStorage.getItem("astrai_rs.key") ?? "";
  setTheme(load("theme"));
}

// --- The server ------------------------------------------------------------------------------------

/** An answer of the server that is not 200. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** @param {string} path @param {object} [body] @param {AbortSignal} [signal] */
async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const options = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const answer = await fetch(path, options).catch(lost("The server cannot be reached"));
  if (answer.ok) {
    wantKey(null);
    return answer;
  }
  const { error } = await answer.json().catch(() => ({}));
  throw new Refusal(answer.status, error?.message ?? `the server answered ${answer.status}`);
}

/** Name a broken connection. @param {string} message */
function lost(message) {
  return () => {
    throw new Error(message);
  };
}

/** The data of server-sent events, up to `[DONE]`. @param {Response} answer */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = "The connection ended before the answer did";
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(lost(broken));
      if (done) throw new Error(broken);
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const data of blocks.map(dataOf)) {
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

function request() {
  const sent = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  if ($("system").value) sent.unshift({ role: "system", content: $("system").value });
  const body = { model, messages: sent, stream: true, stream_options: { include_usage: true } };
  for (const name of SAMPLING) if ($(name).value !== "") body[name] = Number($(name).value);
  return body;
}

async function showModel() {
  try {
    const { data } = await (await call("/v1/models")).json();
    model = data[0]?.id;
    $("model").textContent = model ?? "no model";
    $("model").title = model ?? "";
  } catch (error) {
    $("model").textContent = error.status === 401 ? "API key needed" : "no connection";
    if (error.status === 401) wantKey(error.message);
  }
}

// --- An answer -------------------------------------------------------------------------------------

/** Ask for an answer to the conversation as it stands, and show it as it comes. */
async function ask() {
  const body = request();
  /** @type {Message} */
  const answer = { role: "assistant", content: "", note: "stopped" }; // unless it gets further
  const controller = new AbortController();
  messages.push(answer);
  running = controller;
  saveMessages();
  draw();
  scrollToEnd();
  say("Answering");
  try {
    answer.note = await receive(answer, body, controller.signal);
    say("Answer complete");
  } catch (error) {
    if (controller.signal.aborted) say("Answer ended");
    else fail(answer, error);
  }
  if (running === controller) running = null;
  saveMessages();
  draw();
  if (!model && !answer.error) showModel();
}

/** Fill `answer` from the stream. @param {Message} answer @returns {Promise<string>} how it went */
async function receive(answer, body, signal) {
  const start = performance.now();
  const times = { tokens: 0, wait: 0, span: 0, isCut: false };
  for await (const event of events(await call("/v1/chat/completions", body, signal))) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    if (choice?.delta?.content || choice?.delta?.reasoning_content) {
      const now = performance.now() - start;
      if (times.wait) times.span = now - times.wait;
      else times.wait = now;
      extend(answer, choice.delta);
    }
    times.isCut ||= choice?.finish_reason === "length";
    times.tokens = event.usage?.completion_tokens ?? times.tokens;
  }
  return summary(times);
}

function extend(answer, { content, reasoning_content: reasoning }) {
  answer.content += content ?? "";
  if (reasoning) answer.reasoning = (answer.reasoning ?? "") + reasoning;
  paintSoon(answer);
}

/** @param {{tokens: number, wait: number, span: number, isCut: boolean}} times in milliseconds */
function summary({ tokens, wait, span, isCut }) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (span && tokens > 1) parts.push(`${(((tokens - 1) * 1000) / span).toFixed(1)} tokens/s`);
  if (wait) parts.push(`first after ${Math.round(wait)} ms`);
  if (isCut) parts.push("ended at the token limit");
  return parts.join(" · ");
}

function fail(answer, error) {
  delete answer.note;
  answer.error = error.message;
  say("");
  if (error.status === 401) wantKey(error.message);
}

/** Open the key's field and say why; `null`: the key is right. @param {string | null} reason */
function wantKey(reason) {
  $("key-note").hidden = reason === null;
  $("key").toggleAttribute("aria-invalid", reason !== null);
  if (reason === null) return;
  $("key-note").textContent = `The server wants an API key: ${reason}`;
  toggleSettings(true);
  $("key").focus();
}

// --- The conversation ------------------------------------------------------------------------------

/** The cards of messages: a drawn one stays, with what is selected or open in it. @type {WeakMap<Message, HTMLElement>} */
const cards = new WeakMap();

function draw() {
  const box = $("messages");
  following(() => {
    const nodes = messages.length ? messages.map(cardOf) : [emptyNote()];
    patch(box, nodes, (old, node) => old === node);
  });
  for (const node of box.querySelectorAll(".when-idle")) node.disabled = running !== null;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  if (document.activeElement === document.body) focusInput();
}

/** Make `nodes` the children of `parent`, without touching those that are there already. */
function patch(parent, nodes, isSame) {
  for (const [index, node] of nodes.entries()) {
    const old = parent.childNodes[index];
    if (!old) parent.append(node);
    else if (!isSame(old, node)) old.replaceWith(node);
  }
  while (parent.childNodes.length > nodes.length) parent.lastChild.remove();
}

/** Follow the end of the conversation through a change, unless the reader has scrolled up. */
function following(change) {
  const box = $("messages");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (follows) scrollToEnd();
}

function scrollToEnd() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function emptyNote() {
  return element("p", { class: "empty" }, "Ask something. The conversation stays in this browser.");
}

/** @param {Message} message */
function cardOf(message) {
  const known = cards.get(message);
  const card = known ?? (message.role === "user" ? userCard(message) : answerCard());
  cards.set(message, card);
  if (message.role === "assistant") paint(message);
  return card;
}

function userCard(message) {
  const foot = element("div", { class: "foot" }, copyButton(() => message.content, "Copy message"));
  foot.append(button("Edit", () => edit(message), "when-idle"));
  return element("article", { class: "user", "aria-label": "You" }, element("div", { class: "body" }, message.content), foot);
}

function answerCard() {
  const reasoning = element("details", { hidden: "" }, element("summary", {}, "Reasoning"), element("div"));
  reasoning.firstChild.addEventListener("click", () => (reasoning.dataset.chosen = ""));
  const foot = element("div", { class: "foot" });
  return element("article", { class: "assistant", "aria-label": "Model" }, reasoning, element("div", { class: "body" }), foot);
}

/** Bring an answer's card up to date. @param {Message} message */
function paint(message) {
  const card = cards.get(message);
  const [reasoning, body, foot] = ["details", ".body", ".foot"].map((part) => card.querySelector(part));
  const isOpen = running !== null && message === messages.at(-1);
  card.setAttribute("aria-busy", String(isOpen));
  reasoning.hidden = !message.reasoning;
  if (message.reasoning) reasoning.lastChild.textContent = message.reasoning;
  if (!("chosen" in reasoning.dataset)) reasoning.open = isOpen && !message.content;
  body.classList.toggle("waiting", isOpen);
  patch(body, render(message.content), (old, node) => old.isEqualNode(node));
  if (isOpen) foot.replaceChildren();
  else if (!foot.hasChildNodes()) fillFoot(foot, message);
}

/** @type {Set<Message>} */
const unpainted = new Set();

/** Paint at most once per frame: pieces may come faster. @param {Message} message */
function paintSoon(message) {
  if (!unpainted.size) requestAnimationFrame(paintAll);
  unpainted.add(message);
}

function paintAll() {
  following(() => unpainted.forEach(paint));
  unpainted.clear();
}

function fillFoot(foot, message) {
  if (message.error) foot.before(element("p", { class: "error", role: "alert" }, message.error));
  if (message.note) foot.append(element("span", {}, message.note));
  if (message.content) foot.append(copyButton(() => message.content, "Copy answer"));
  foot.append(button("Retry", () => retry(message), "when-idle"));
}

function button(label, action, kind = "") {
  const node = element("button", { type: "button", class: kind }, label);
  node.addEventListener("click", action);
  return node;
}

// --- What the user does ----------------------------------------------------------------------------

/** Change a message of the user's; sending it drops what followed. @param {Message} message */
function edit(message) {
  const card = cards.get(message);
  const field = element("textarea", { class: "edit", rows: "3", "aria-label": "Edit message" });
  field.value = message.content;
  const cancel = () => {
    cards.delete(message);
    draw();
    cards.get(message).querySelector(".when-idle").focus();
  };
  const resend = () => {
    if (running || !field.value.trim()) return;
    cut(message, { role: "user", content: field.value.trim() });
    ask();
  };
  const buttons = [button("Cancel", cancel), button("Send", resend, "when-idle main")];
  card.replaceChildren(field, element("div", { class: "foot" }, ...buttons));
  field.addEventListener("keydown", (event) => {
    onEnter(event, resend);
    if (event.key !== "Escape" || running) return;
    event.stopPropagation();
    cancel();
  });
  grow(field);
  field.focus();
}

/** @param {Message} answer */
function retry(answer) {
  cut(answer);
  ask();
}

/** Put `others` in place of a message and all that followed it. @param {Message} message @param {Message[]} others */
function cut(message, ...others) {
  messages = [...messages.slice(0, messages.indexOf(message)), ...others];
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  grow($("input"));
  messages.push({ role: "user", content: text });
  ask();
}

function newChat() {
  running?.abort();
  running = null;
  messages = [];
  saveMessages();
  draw();
  say("New chat");
  focusInput();
}

/** Stop before the browser does, which looks like a broken connection. */
function leave() {
  if (!running) return;
  saveMessages();
  running.abort();
}

function onEnter(event, action) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  action();
}

function onEscape() {
  if (running) running.abort();
  else if (!$("settings").hidden) {
    toggleSettings(false);
    $("settings-toggle").focus();
  }
}

// --- The page --------------------------------------------------------------------------------------

/** Make a text field as high as its text; the style sheet sets the most. */
function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

/** Not where that would open a keyboard on the screen. */
function focusInput() {
  if (!matchMedia("(pointer: coarse)").matches) $("input").focus({ preventScroll: true });
}

/** Tell screen readers. */
function say(text) {
  $("status").textContent = text;
}

function toggleSettings(open) {
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
}

/** @param {"dark" | "light" | undefined} theme `undefined`: the system's */
function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function toggleTheme() {
  const systems = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (document.documentElement.dataset.theme ?? systems) === "dark" ? "light" : "dark";
  store("theme", theme);
  setTheme(theme);
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("input").addEventListener("keydown", (event) => onEnter(event, send));
  $("input").addEventListener("input", () => grow($("input")));
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", newChat);
  $("theme").addEventListener("click", toggleTheme);
  $("settings-toggle").addEventListener("click", () => toggleSettings($("settings").hidden));
  $("settings").addEventListener("change", saveSettings);
  $("key").addEventListener("change", showModel);
  document.addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && onEscape());
  addEventListener("pagehide", leave);
}

restore();
listen();
draw();
scrollToEnd();
focusInput();
showModel();

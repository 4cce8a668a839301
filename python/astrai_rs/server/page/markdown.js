"use strict";
/**
 * A small part of Markdown as DOM nodes. Text never becomes HTML: every piece is appended as a text node.
 */

/** @param {string} tag @param {Record<string, string>} [attributes] @param {(Node | string)[]} children */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A button that copies and says so. @param {() => string} text @param {string} name what it copies */
export function copyButton(text, name) {
  const node = element("button", { type: "button", "aria-label": name }, "Copy");
  node.addEventListener("click", async () => {
    node.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (node.textContent = "Copy"), 1500);
  });
  return node;
}

/** @param {string} text @returns {Promise<boolean>} whether it is on the clipboard */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // browsers have no clipboard object on plain http, but for localhost
  }
}

function copyBySelection(text) {
  const before = document.activeElement;
  const field = element("textarea", { class: "visually-hidden", "aria-hidden": "true", readonly: "" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}

// --- Inline ----------------------------------------------------------------------------------------

// No alternative runs past the next mark of its own kind, which keeps hostile text linear.
const INLINE = new RegExp(
  [
    /`(?<code>[^`\n]+)`/,
    /\*\*(?![\s*])(?<bold>(?:[^*\n]|\*(?!\*(?!\*)))+)(?<!\s)\*\*/,
    /\*(?![\s*])(?<italic>[^*\n]+)(?<!\s)\*/,
    /(?<!\w)_(?![\s_])(?<underlined>[^_\n]+)(?<!\s)_(?!\w)/,
    /\[(?<label>[^[\]\n]+)\]\((?<url>https?:\/\/[^\s()]+(?:\([^\s()]*\)[^\s()]*)*)\)/,
  ]
    .map((part) => part.source)
    .join("|"),
  "g",
);

/** Code, bold, italics and links of one line. @param {string} text @returns {(Node | string)[]} */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index), styled(match.groups));
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end)].filter((node) => node !== "");
}

function styled({ code, bold, italic, underlined, label, url }) {
  if (code) return element("code", {}, code);
  if (bold) return element("strong", {}, ...inline(bold));
  if (url) return element("a", { href: url, rel: "noopener noreferrer", target: "_blank" }, label);
  return element("em", {}, ...inline(italic ?? underlined));
}

// --- Blocks ----------------------------------------------------------------------------------------

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^(#{1,6}) +(.*)/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)]) +(.*)/;
const DEEPEST = 6;

/** @param {string} text @returns {Node[]} */
export function render(text) {
  const lines = text.split("\n");
  const nodes = [];
  while (lines.length) {
    if (!lines[0].trim()) lines.shift();
    else nodes.push(block(lines));
  }
  return nodes;
}

/** Take the block at the start off `lines`. @param {string[]} lines @returns {Node} */
function block(lines) {
  if (FENCE.test(lines[0])) return fence(lines);
  if (HEADING.test(lines[0])) return heading(lines);
  if (RULE.test(lines[0])) return lines.shift() && element("hr");
  if (ITEM.test(lines[0])) return list(lines, 1);
  return paragraph(lines);
}

/** Lines up to the first that `test` refuses, taken off `lines`. */
function take(lines, test) {
  const end = lines.findIndex((line) => !test(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

function fence(lines) {
  const [, indent, marks, language] = FENCE.exec(lines.shift());
  const closes = (line) => line.trim().startsWith(marks) && !line.trim().replaceAll(marks[0], "");
  const code = take(lines, (line) => !closes(line)).map((line) =>
    line.startsWith(indent) ? line.slice(indent.length) : line.trimStart(),
  );
  lines.shift();
  return codeBlock(code.join("\n"), language);
}

/** @param {string} code @param {string} language */
function codeBlock(code, language) {
  const head = element("div", { class: "code-head" }, language, copyButton(() => code, "Copy code"));
  return element("div", { class: "code" }, head, element("pre", { tabindex: "0" }, element("code", {}, code)));
}

function heading(lines) {
  const [, marks, text] = HEADING.exec(lines.shift());
  return element(`h${Math.min(4, marks.length + 1)}`, {}, ...inline(text));
}

function paragraph(lines) {
  const node = element("p", {}, ...inline(lines.shift()));
  for (const line of take(lines, isText)) node.append(element("br"), ...inline(line));
  return node;
}

function isText(line) {
  return Boolean(line.trim()) && ![FENCE, HEADING, RULE, ITEM].some((other) => other.test(line));
}

/** A list with what belongs to its items: deeper lists, code, further lines. */
function list(lines, depth) {
  const [, indent, number] = ITEM.exec(lines[0]);
  const node = number === undefined ? element("ul") : element("ol", { start: number });
  for (let kind = next(lines, indent, number, depth); kind; kind = next(lines, indent, number, depth)) {
    if (kind === "item") node.append(element("li", {}, ...inline(ITEM.exec(lines.shift())[3])));
    else if (kind === "list") node.lastChild.append(list(lines, depth + 1));
    else if (kind === "code") node.lastChild.append(fence(lines));
    else node.lastChild.append(element("br"), ...inline(lines.shift().trim()));
  }
  return node;
}

/** What the next line is to a list; `undefined` where the list ends. Takes blank lines inside it. */
function next(lines, indent, number, depth) {
  const ahead = lines.findIndex((line) => line.trim());
  if (ahead < 0) return undefined;
  const kind = kindOf(lines[ahead], indent, number, depth);
  if (ahead > 0 && kind === "text") return undefined;
  if (kind) lines.splice(0, ahead);
  return kind;
}

function kindOf(line, indent, number, depth) {
  const item = RULE.test(line) ? null : ITEM.exec(line);
  const inside = /^\s*/.exec(line)[0].length > indent.length;
  if (item && inside && depth < DEEPEST) return "list";
  if (item) {
    const isOurs = item[1].length >= indent.length && (item[2] === undefined) === (number === undefined);
    return isOurs ? "item" : undefined;
  }
  if (!inside) return undefined;
  return FENCE.test(line) ? "code" : "text";
}

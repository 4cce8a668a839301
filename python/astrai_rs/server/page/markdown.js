/**
 * A small part of Markdown as DOM nodes. Text never becomes HTML: every piece goes through `textContent`.
 */

/** @param {string} tag @param {Record<string, string>} [attributes] @param {(Node | string)[]} children */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\n]+\*)|(\[[^\]\n]+\]\((https?:\/\/[^\s)]+)\))/;

/** Code, bold, italics and links of one line. @param {string} text @returns {(Node | string)[]} */
function inline(text) {
  const nodes = [];
  for (let match = INLINE.exec(text); match; match = INLINE.exec(text)) {
    nodes.push(text.slice(0, match.index));
    const [whole, code, bold, italic, link, url] = match;
    if (code) nodes.push(element("code", {}, code.slice(1, -1)));
    else if (bold) nodes.push(element("strong", {}, ...inline(bold.slice(2, -2))));
    else if (italic) nodes.push(element("em", {}, ...inline(italic.slice(1, -1))));
    else {
      const label = link.slice(1, link.indexOf("]("));
      nodes.push(element("a", { href: url, rel: "noopener noreferrer", target: "_blank" }, label));
    }
    text = text.slice(match.index + whole.length);
  }
  return [...nodes, text];
}

/** @param {string} code */
function codeBlock(code) {
  const copy = element("button", { type: "button", "aria-label": "Copy code" }, "Copy");
  copy.addEventListener("click", () => navigator.clipboard?.writeText(code));
  return element("pre", { tabindex: "0" }, element("code", {}, code), copy);
}

/** Lines up to the first that `test` refuses, taken off `lines`. */
function take(lines, test) {
  const end = lines.findIndex((line) => !test(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

const BULLET = /^\s*[-*+] +/;
const NUMBER = /^\s*\d+[.)] +/;

function list(tag, lines, marker) {
  const items = take(lines, (line) => marker.test(line));
  return element(tag, {}, ...items.map((line) => element("li", {}, ...inline(line.replace(marker, "")))));
}

/** @param {string} text @returns {Node[]} */
export function render(text) {
  const lines = text.split("\n");
  const nodes = [];
  while (lines.length) {
    const line = lines[0];
    const heading = /^(#{1,6}) +(.*)/.exec(line);
    if (line.startsWith("```")) {
      lines.shift();
      const code = take(lines, (each) => !each.startsWith("```"));
      lines.shift();
      nodes.push(codeBlock(code.join("\n")));
    } else if (heading) {
      lines.shift();
      nodes.push(element(`h${Math.min(4, heading[1].length + 1)}`, {}, ...inline(heading[2])));
    } else if (BULLET.test(line)) nodes.push(list("ul", lines, BULLET));
    else if (NUMBER.test(line)) nodes.push(list("ol", lines, NUMBER));
    else if (!line.trim()) lines.shift();
    else nodes.push(paragraph(lines));
  }
  return nodes;
}

function paragraph(lines) {
  const first = lines.shift();
  const isText = (line) => line.trim() && !line.startsWith("```") && !/^#{1,6} /.test(line) && !BULLET.test(line);
  const node = element("p", {}, ...inline(first));
  for (const line of take(lines, isText)) node.append(element("br"), ...inline(line));
  return node;
}

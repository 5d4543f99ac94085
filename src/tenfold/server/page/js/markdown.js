// Markdown as models write it, block by block: CommonMark with tables and maths, without HTML, indented code and
// underlined headings (a `---` below a line of text is meant as a rule).

import { copyButton } from "./buttons.js";
import { element } from "./element.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";
import { renderMath } from "./math.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const MATH = /^\s*(\$\$|\\\[|\\begin\{(equation|align|gather|multline|alignat)\*?\})/;
const DEEPEST = 12; // lists and quotes within one another; deeper ones are text

/**
 * @typedef {{kind: "code", language: string, text: string}} Code
 * @typedef {{kind: "heading", level: number, text: string}} Heading
 * @typedef {{kind: "list", start: number | null, loose: boolean, items: Block[][]}} List
 * @typedef {{kind: "quote", blocks: Block[]}} Quote
 * @typedef {{kind: "table", aligns: string[], rows: string[][]}} Table
 * @typedef {{kind: "rule"}} Rule
 * @typedef {{kind: "math" | "paragraph", text: string}} Text
 * @typedef {(Code | Heading | List | Quote | Table | Rule | Text) & {source?: string}} Block
 */

/** Shows a growing text: blocks whose source stayed the same keep their elements, and what is selected in them. */
export class MarkdownView {
  /** @param {HTMLElement} root whose children are the blocks' elements, and nothing else */
  constructor(root) {
    this.root = root;
    /** @type {string[]} */
    this.sources = [];
  }

  /** @param {string} text all of it */
  update(text) {
    const blocks = parse(text);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.sources[same]) same++;
    while (this.root.children.length > same) this.root.lastChild?.remove();
    this.root.append(...blocks.slice(same).map((block) => render(block)));
    this.sources = blocks.map((block) => block.source ?? "");
  }
}

/**
 * @param {string} text
 * @returns {Block[]} each with its source
 */
export function parse(text) {
  return blocksOf(text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n"), 0);
}

/** @param {string[]} lines @param {number} depth @returns {Block[]} */
function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** @typedef {[block: Block, end: number]} Parsed */

/** @param {string[]} lines @param {number} at @param {number} depth @returns {Parsed} */
function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line), heading = HEADING.exec(line);
  if (fence) return code(lines, at, fence[1], fence[2]);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: withoutTail(heading[2] ?? "") }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  return mathBlock(lines, at) ?? table(lines, at) ?? paragraph(lines, at);
}

const withoutTail = (/** @type {string} */ text) => text.trim().replace(/(^|\s)#+$/, "").trim();

/** @param {string[]} lines @param {number} at @param {string} fence @param {string} info @returns {Parsed} */
function code(lines, at, fence, info) {
  const indent = indentOf(lines[at]);
  const closes = (/** @type {string} */ line) => {
    const found = /^ {0,3}(`{3,}|~{3,})\s*$/.exec(line);
    return found !== null && found[1][0] === fence[0] && found[1].length >= fence.length;
  };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const content = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return [{ kind: "code", language: info.trim().split(/[\s{]/)[0], text: content.join("\n") }, end + 1];
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {Parsed} */
function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && (QUOTE.test(lines[end]) || (end > at && continuesText(lines, end)))) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ kind: "quote", blocks: blocksOf(inner, depth + 1) }, end];
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {Parsed} */
function list(lines, at, depth) {
  const first = /** @type {RegExpExecArray} */ (ITEM.exec(lines[at]));
  const sort = first[2].at(-1);
  const items = [];
  let end = at, loose = false;
  for (let next = at; next < lines.length; next = afterBlanks(lines, end)) {
    const marker = ITEM.exec(lines[next]);
    if (!marker || marker[2].at(-1) !== sort || RULE.test(lines[next])) break;
    if (next > end) loose = true;
    end = itemEnd(lines, next, marker);
    const blocks = blocksOf(itemLines(lines.slice(next, end), marker), depth + 1);
    loose ||= gapBetween(lines.slice(next, end), blocks);
    items.push(blocks);
  }
  const start = /\d/.test(first[2]) ? Number.parseInt(first[2], 10) : null;
  return [{ kind: "list", start, loose, items }, end];
}

/** Where an item's text begins: behind its marker and the blanks that follow. */
const itemIndent = (/** @type {RegExpExecArray} */ marker) =>
  marker[1].length + marker[2].length + (marker[3].length > 4 || !marker[3] ? 1 : marker[3].length);

/**
 * The line behind an item: what is indented belongs to it, and so does a list that is indented by two at least, though
 * its parent's text begins further right.
 * @param {string[]} lines @param {number} at @param {RegExpExecArray} marker
 */
function itemEnd(lines, at, marker) {
  const inside = (/** @type {string} */ line) =>
    indentOf(line) >= itemIndent(marker) || (ITEM.test(line) && indentOf(line) >= marker[1].length + 2);
  let end = at + 1;
  while (end < lines.length) {
    const next = afterBlanks(lines, end);
    if (next < lines.length && inside(lines[next])) end = next + 1;
    else if (next === end && next < lines.length && continuesText(lines, next)) end = next + 1;
    else break;
  }
  return end;
}

/** @param {string[]} lines of an item @param {RegExpExecArray} marker @returns {string[]} */
function itemLines(lines, marker) {
  const indent = itemIndent(marker);
  const head = lines[0].slice(Math.min(indent, lines[0].length));
  return [head, ...lines.slice(1).map((line) => line.slice(Math.min(indent, indentOf(line))))];
}

/** Whether an empty line parts two blocks of an item. */
const gapBetween = (/** @type {string[]} */ lines, /** @type {Block[]} */ blocks) =>
  blocks.length > 1 && blocks[1].kind !== "list" && lines.some((line) => line.trim() === "");

/** @param {string[]} lines @param {number} at */
function afterBlanks(lines, at) {
  while (at < lines.length && lines[at].trim() === "") at++;
  return at;
}

const indentOf = (/** @type {string} */ line) => line.length - line.trimStart().length;

/** @param {string[]} lines @param {number} at @returns {Parsed | null} */
function mathBlock(lines, at) {
  const opened = MATH.exec(lines[at]);
  if (!opened) return null;
  const environment = opened[1].startsWith("\\begin");
  const close = environment ? opened[1].replace("begin", "end") : opened[1] === "$$" ? "$$" : "\\]";
  const begin = lines[at].indexOf(opened[1]) + opened[1].length;
  for (let end = at; end < lines.length && lines[end].trim() !== ""; end++) {
    const closed = lines[end].indexOf(close, end === at ? begin : 0);
    if (closed < 0) continue;
    if (lines[end].slice(closed + close.length).trim() !== "") return null; // text goes on: a paragraph with maths
    const source = lines.slice(at, end + 1).join("\n").trim();
    return [{ kind: "math", text: environment ? source : source.slice(opened[1].length, -close.length) }, end + 1];
  }
  return null;
}

/** @param {string[]} lines @param {number} at @returns {Parsed | null} */
function table(lines, at) {
  if (!startsTable(lines, at)) return null;
  const header = cells(lines[at]);
  const aligns = cells(lines[at + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : ""));
  let end = at + 2;
  while (end < lines.length && lines[end].trim() !== "" && lines[end].includes("|")) end++;
  const body = lines.slice(at + 2, end).map(cells).map((row) => header.map((_, column) => row[column] ?? ""));
  return [{ kind: "table", aligns, rows: [header, ...body] }, end];
}

/** @param {string[]} lines @param {number} at */
function startsTable(lines, at) {
  if (!lines[at].includes("|") || !/^[\s|:-]+$/.test(lines[at + 1] ?? "")) return false;
  const marks = cells(lines[at + 1]);
  return marks.length === cells(lines[at]).length && marks.every((mark) => /^:?-+:?$/.test(mark));
}

/** The cells of a row; a bar in code or behind a backslash parts none. */
function cells(/** @type {string} */ line) {
  const found = line.trim().replace(/^\|/, "").match(/(?:\\.|`[^`]*`|[^|\\`]|[\\`])+|\|/g) ?? [];
  const row = [""];
  for (const piece of found) {
    if (piece === "|") row.push("");
    else row[row.length - 1] = piece;
  }
  if (row.length > 1 && row.at(-1)?.trim() === "") row.pop();
  return row.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** @param {string[]} lines @param {number} at @returns {Parsed} */
function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && continuesText(lines, end)) end++;
  return [{ kind: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd() }, end];
}

/** Whether a line goes on with the paragraph before it. Of numbered lists only one that starts at 1 ends a paragraph. */
function continuesText(/** @type {string[]} */ lines, /** @type {number} */ at) {
  const line = lines[at];
  if (line.trim() === "" || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return false;
  const item = ITEM.exec(line);
  if (item && item[3] !== "" && (!/\d/.test(item[2]) || item[2].length === 2)) return false;
  return !MATH.test(line) && !startsTable(lines, at);
}

// ---- elements ----

/** @param {Block} block @returns {HTMLElement} */
export function render(block) {
  switch (block.kind) {
    case "code": return codeElement(block);
    case "heading": return element(`h${Math.min(6, block.level)}`, {}, ...inline(block.text));
    case "list": return listElement(block);
    case "quote": return element("blockquote", {}, ...block.blocks.map(render));
    case "table": return tableElement(block);
    case "rule": return element("hr");
    case "math": return element("div", { class: "math" }, renderMath(block.text, true));
    case "paragraph": return element("p", {}, ...inline(block.text));
  }
}

/** @param {Code} block */
function codeElement(block) {
  const code = element("code", {}, ...highlight(block.text, block.language.toLowerCase()));
  const bar = element("figcaption", {}, element("span", {}, block.language), copyButton("Copy code", () => block.text));
  return element("figure", { class: "code" }, bar, element("pre", { tabindex: "0" }, code));
}

/** @param {List} block */
function listElement(block) {
  const items = block.items.map((blocks) => itemElement(blocks, block.loose));
  if (block.start === null) return element("ul", {}, ...items);
  return element("ol", { start: block.start === 1 ? null : block.start }, ...items);
}

/** @param {Block[]} blocks @param {boolean} loose */
function itemElement(blocks, loose) {
  const [first, ...others] = blocks;
  if (first?.kind !== "paragraph") return element("li", {}, ...blocks.map(render));
  const task = /^\[([ xX])\]\s+/.exec(first.text);
  const text = inline(task ? first.text.slice(task[0].length) : first.text);
  const box = task && element("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
  const head = loose ? [element("p", {}, box, ...text)] : [box, ...text];
  return element("li", { class: task && "task" }, ...head, ...others.map(render));
}

/** @param {Table} block */
function tableElement(block) {
  const row = (/** @type {string[]} */ texts, /** @type {string} */ name) =>
    element("tr", {}, ...texts.map((text, i) => element(name, { class: block.aligns[i] || null }, ...inline(text))));
  const [header, ...body] = block.rows;
  const table = element("table", {}, element("thead", {}, row(header, "th")));
  table.append(element("tbody", {}, ...body.map((texts) => row(texts, "td"))));
  return element("div", { class: "table", tabindex: "0" }, table);
}

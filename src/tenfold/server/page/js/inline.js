// Inline Markdown: emphasis, code, links, maths, line breaks. HTML stays text, and images become links.

import { element } from "./element.js";
import { renderMath } from "./math.js";

const SAFE_LINK = /^(https?:\/\/|mailto:)/i;
const BARE_LINK = /^https?:\/\/[^\s<>"'`]+/;
const WORD = /[\p{L}\p{N}]/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };
const LONGEST_LINK = 2000; // characters
const DEEPEST = 8; // links, within which there is Markdown again
const REACH = 400; // pieces of text over which emphasis goes; bounds the search for where it began

/** @typedef {{mark: string, length: number, opens: boolean, closes: boolean}} Run of equal marks of emphasis */

/**
 * @param {string} text of a paragraph, a heading or a cell
 * @param {number} [depth]
 * @returns {Node[]}
 */
export function inline(text, depth = 0) {
  const scanner = new Scanner(text, depth);
  return emphasised(scanner.scan());
}

/** Cuts text into nodes and runs of emphasis marks, from left to right. */
class Scanner {
  /**
   * @param {string} text
   * @param {number} depth
   */
  constructor(text, depth) {
    this.text = text;
    this.depth = depth;
    this.at = 0;
    this.plain = "";
    /** @type {Array<Node | Run>} */
    this.items = [];
    /** @type {Map<number, number> | undefined} pairs of brackets, found when first needed */
    this.square = undefined;
    /** @type {Map<number, number> | undefined} */
    this.round = undefined;
    /** @type {Set<string>} closing marks that are known to be nowhere behind */
    this.absent = new Set();
  }

  scan() {
    while (this.at < this.text.length) {
      const found = this.special(this.text[this.at]);
      if (!found) this.plain += this.text[this.at++];
    }
    this.flush();
    return this.items;
  }

  /**
   * Takes what this character begins; false where it is only a character.
   * @param {string} character
   * @returns {boolean}
   */
  special(character) {
    switch (character) {
      case "\\": return this.backslash();
      case "`": return this.code();
      case "$": return this.dollar();
      case "!": return this.text[this.at + 1] === "[" && this.link(1);
      case "[": return this.link(0);
      case "<": return this.angle();
      case "&": return this.entity();
      case "h": return this.bareLink();
      case "*": case "_": case "~": return this.run(character);
      case "\n": return this.lineBreak();
      default: return false;
    }
  }

  /** @param {Node | Run} item @param {number} end where scanning goes on */
  take(item, end) {
    this.flush();
    this.items.push(item);
    this.at = end;
    return true;
  }

  flush() {
    if (this.plain) this.items.push(document.createTextNode(this.plain));
    this.plain = "";
  }

  backslash() {
    const next = this.text[this.at + 1];
    if (next === "(" && this.math("\\(", "\\)", false)) return true;
    if (next === "[" && this.math("\\[", "\\]", true)) return true;
    if (next === undefined || !ESCAPABLE.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  lineBreak() {
    this.plain = this.plain.trimEnd();
    return this.take(element("br"), this.at + 1);
  }

  code() {
    const mark = /^`+/.exec(this.text.slice(this.at, this.at + 100))?.[0] ?? "`";
    const begin = this.at + mark.length;
    const end = this.closing(mark, begin, (i) => this.text[i - 1] !== "`" && this.text[i + mark.length] !== "`");
    if (end < 0) {
      this.plain += mark;
      this.at = begin;
      return true;
    }
    let content = this.text.slice(begin, end).replaceAll("\n", " ");
    if (/^ .*[^ ].* $/.test(content)) content = content.slice(1, -1);
    return this.take(element("code", {}, content), end + mark.length);
  }

  dollar() {
    if (this.text[this.at + 1] === "$") return this.math("$$", "$$", true);
    if (/[\s$]/.test(this.text[this.at + 1] ?? " ")) return false;
    // A sum of money is no formula: a closing dollar follows a formula's last letter at once, and no digit follows it.
    const fits = (/** @type {number} */ i) => !/[\s\\]/.test(this.text[i - 1]) && !/\d/.test(this.text[i + 1] ?? "");
    const end = this.closing("$", this.at + 1, fits);
    return end > 0 && this.take(renderMath(this.text.slice(this.at + 1, end), false), end + 1);
  }

  /** @param {string} open @param {string} close @param {boolean} display */
  math(open, close, display) {
    const begin = this.at + open.length;
    const end = this.closing(close, begin, () => true);
    const source = this.text.slice(begin, end);
    return end > 0 && source.trim() !== "" && this.take(renderMath(source, display), end + close.length);
  }

  /**
   * Where a mark follows that fits; -1 where none does.
   * @param {string} mark
   * @param {number} from
   * @param {(index: number) => boolean} fits
   */
  closing(mark, from, fits) {
    if (this.absent.has(mark)) return -1;
    for (let i = this.text.indexOf(mark, from); i >= 0; i = this.text.indexOf(mark, i + 1)) if (fits(i)) return i;
    this.absent.add(mark);
    return -1;
  }

  /** `[label](target "title")`; with a `!` before it an image, which is shown as a link: nothing is loaded unasked. */
  link(/** @type {number} */ bang) {
    this.square ??= brackets(this.text, "[", "]");
    this.round ??= brackets(this.text, "(", ")");
    const begin = this.at + bang, middle = this.square.get(begin) ?? -1, end = this.round.get(middle + 1) ?? -1;
    if (middle < 0 || end < 0 || this.depth >= DEEPEST) return false;
    const target = /^\s*<?([^\s<>]*)>?(?:\s+["'(][^"']*["')])?\s*$/.exec(this.text.slice(middle + 2, end));
    if (!target) return false;
    const label = this.text.slice(begin + 1, middle);
    const children = label ? inline(label, this.depth + 1) : [document.createTextNode(target[1])];
    return this.take(anchor(target[1], children), end + 1);
  }

  angle() {
    const rest = this.text.slice(this.at, this.at + LONGEST_LINK);
    const line = /^<br ?\/?>/i.exec(rest);
    if (line) return this.take(element("br"), this.at + line[0].length);
    const link = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i.exec(rest);
    return link !== null && this.take(anchor(link[1], [document.createTextNode(link[1])]), this.at + link[0].length);
  }

  entity() {
    const found = /^&(#?\w{1,5});/.exec(this.text.slice(this.at, this.at + 8));
    const character = found && Object.hasOwn(ENTITIES, found[1]) ? ENTITIES[/** @type {"amp"} */ (found[1])] : null;
    if (!found || !character) return false;
    this.plain += character;
    this.at += found[0].length;
    return true;
  }

  bareLink() {
    if (WORD.test(this.plain.at(-1) ?? " ")) return false;
    const found = BARE_LINK.exec(this.text.slice(this.at, this.at + LONGEST_LINK))?.[0];
    if (!found) return false;
    const address = trimmed(found);
    return this.take(anchor(address, [document.createTextNode(address)]), this.at + address.length);
  }

  /** A run of `*`, `_` or `~`, and by its neighbours whether it may begin or end emphasis, as CommonMark has it. */
  run(/** @type {string} */ mark) {
    let end = this.at;
    while (this.text[end] === mark) end++;
    const length = end - this.at;
    if (mark === "~" && length !== 2) {
      this.plain += this.text.slice(this.at, end);
      this.at = end;
      return true;
    }
    const before = this.at === 0 ? " " : this.text[this.at - 1], after = this.text[end] ?? " ";
    const left = flanks(after, before), right = flanks(before, after);
    const inWord = mark === "_" && left && right;
    const opens = left && (!inWord || PUNCTUATION.test(before)), closes = right && (!inWord || PUNCTUATION.test(after));
    return this.take({ mark, length, opens, closes }, end);
  }
}

/** @param {string} inner the neighbour within @param {string} outer the neighbour without */
function flanks(inner, outer) {
  return !/\s/.test(inner) && (!PUNCTUATION.test(inner) || /\s/.test(outer) || PUNCTUATION.test(outer));
}

/** A link out of a text; the full stop behind it, and a bracket around both, are not part of it. */
function trimmed(/** @type {string} */ address) {
  let end = address.length;
  while (/[.,:;!?*_~]/.test(address[end - 1])) end--;
  if (address[end - 1] === ")" && !address.slice(0, end).includes("(")) end--;
  return address.slice(0, end);
}

/**
 * Where each opening bracket has its closing one.
 * @param {string} text
 * @param {string} open
 * @param {string} close
 * @returns {Map<number, number>}
 */
function brackets(text, open, close) {
  /** @type {Map<number, number>} */
  const pairs = new Map();
  const begun = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === open) begun.push(i);
    else if (text[i] === close && begun.length > 0) pairs.set(/** @type {number} */ (begun.pop()), i);
  }
  return pairs;
}

/** A link, where its scheme can do no harm; else the words and the address, as text. */
function anchor(/** @type {string} */ address, /** @type {Node[]} */ children) {
  if (!SAFE_LINK.test(address)) return element("span", {}, ...children, ` (${address})`);
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/**
 * Resolves the runs of marks into <em>, <strong> and <del>; what is left of them is text.
 * @param {Array<Node | Run>} items
 * @returns {Node[]}
 */
function emphasised(items) {
  /** @type {Array<Node | Run>} */
  const out = [];
  for (const item of items) {
    if (item instanceof Node) {
      out.push(item);
      continue;
    }
    if (item.closes) close(out, item);
    if (item.length > 0) out.push(item.opens ? item : asText(item));
  }
  return out.map((item) => (item instanceof Node ? item : asText(item)));
}

/** Lets a run end what runs before it in `out` began, the nearest first. */
function close(/** @type {Array<Node | Run>} */ out, /** @type {Run} */ closer) {
  while (closer.length > 0) {
    const at = openerOf(out, closer);
    if (at < 0) return;
    const opener = /** @type {Run} */ (out[at]);
    const used = Math.min(2, opener.length, closer.length);
    const name = closer.mark === "~" ? "del" : used === 2 ? "strong" : "em";
    const inner = out.splice(at + 1).map((item) => (item instanceof Node ? item : asText(item)));
    opener.length -= used;
    closer.length -= used;
    if (opener.length === 0) out.pop();
    out.push(element(name, {}, ...inner));
  }
}

function openerOf(/** @type {Array<Node | Run>} */ out, /** @type {Run} */ closer) {
  for (let at = out.length - 1; at >= Math.max(0, out.length - REACH); at--) {
    const item = out[at];
    if (!(item instanceof Node) && pairs(item, closer)) return at;
  }
  return -1;
}

function pairs(/** @type {Run} */ opener, /** @type {Run} */ closer) {
  if (opener.mark !== closer.mark) return false;
  const ambiguous = opener.closes || closer.opens;
  return !ambiguous || (opener.length + closer.length) % 3 !== 0 || opener.length % 3 === 0;
}

function asText(/** @type {Run} */ run) {
  return document.createTextNode(run.mark.repeat(run.length));
}

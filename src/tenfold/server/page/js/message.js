// One message on the page: what was asked, or an answer with its reasoning, its figures and its buttons.

import { copyButton, iconButton } from "./buttons.js";
import { element } from "./element.js";
import { MarkdownView } from "./markdown.js";
import { seconds, told } from "./stats.js";

/** @typedef {import("./conversation.js").Message} Message */

/**
 * @typedef {object} Actions that a message offers
 * @property {(message: Message, text: string) => void} edit
 * @property {(message: Message) => void} retry
 * @property {(message: Message) => void} choose another version
 * @property {(message: Message) => Message[]} versions
 */

/** What was asked: plain text, which can be edited. */
export class QuestionView {
  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.root = element("article", { class: "message question", "aria-label": "You" });
    this.update();
  }

  update() {
    const { message, actions } = this;
    const tools = element("div", { class: "tools" }, versionSwitch(message, actions));
    tools.append(copyButton("Copy message", () => message.content), iconButton("edit", "Edit message", () => this.edit()));
    this.root.replaceChildren(element("div", { class: "bubble" }, message.content), tools);
  }

  /** Puts a field in the message's place. */
  edit() {
    const field = /** @type {HTMLTextAreaElement} */ (element("textarea", { "aria-label": "Edit message", rows: 1 }));
    field.value = this.message.content;
    const done = () => field.value.trim() && this.actions.edit(this.message, field.value.trim());
    field.addEventListener("input", () => grow(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.cancel();
      else if (sends(event)) done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const cancel = element("button", { type: "button", onclick: () => this.cancel() }, "Cancel");
    const send = element("button", { type: "button", class: "primary", onclick: done }, "Send");
    this.root.replaceChildren(element("div", { class: "editor" }, field, element("div", { class: "row" }, cancel, send)));
    grow(field);
    field.focus();
  }

  cancel() {
    this.update();
    /** @type {HTMLElement | null} */ (this.root.querySelector(".tools button:last-child"))?.focus();
  }
}

/** Whether a key sends what was written. Where there is only a screen to type on, Enter breaks the line. */
export function sends(/** @type {KeyboardEvent} */ event) {
  if (event.key !== "Enter" || event.isComposing) return false;
  return event.ctrlKey || event.metaKey || (!event.shiftKey && matchMedia("(hover: hover)").matches);
}

/** Makes a field as high as its text. */
export function grow(/** @type {HTMLTextAreaElement} */ field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

/** An answer. It is made once, and updated while it grows. */
export class AnswerView {
  /** @param {Message} message @param {Actions} actions */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.asked = performance.now();
    this.summary = element("summary", {}, "Thinking");
    this.thoughts = new MarkdownView(element("div", { class: "prose" }));
    this.reasoning = element("details", { class: "reasoning", hidden: true }, this.summary, this.thoughts.root);
    this.reasoning.addEventListener("toggle", () => this.updateReasoning());
    this.prose = new MarkdownView(element("div", { class: "prose" }));
    this.foot = element("div", { class: "foot" });
    this.root = element("article", { class: "message answer", "aria-label": "Answer" });
    this.root.append(this.reasoning, this.prose.root, this.foot);
    this.update();
  }

  update() {
    const writing = this.message.state === "writing";
    this.root.setAttribute("aria-busy", String(writing));
    this.updateReasoning();
    this.prose.update(this.message.content);
    if (writing) this.showProgress();
    else this.showFoot();
  }

  updateReasoning() {
    const { reasoning, content, state, stats } = this.message;
    this.reasoning.toggleAttribute("hidden", !reasoning);
    if (!reasoning) return;
    const thinking = state === "writing" && !content;
    this.summary.textContent = thinking ? "Thinking…" : `Thought for ${seconds(stats?.reasoningMs ?? 0)}`;
    if (this.reasoning.hasAttribute("open")) this.thoughts.update(reasoning);
  }

  /** A sign of life, with the time where nothing else moves. */
  showProgress() {
    const { content, reasoning } = this.message;
    const waited = Math.floor((performance.now() - this.asked) / 1000);
    const text = content || reasoning ? "" : waited > 0 ? `Reading, ${waited} s` : "Reading";
    if (!this.pulse) {
      this.pulse = element("span", { class: "waiting" });
      this.foot.replaceChildren(element("span", { class: "pulse", "aria-hidden": "true" }), this.pulse);
      this.ticking = setInterval(() => (this.root.isConnected ? this.update() : clearInterval(this.ticking)), 1000);
    }
    if (this.pulse.textContent !== text) this.pulse.textContent = text;
  }

  showFoot() {
    clearInterval(this.ticking);
    this.pulse = undefined;
    const { message, actions } = this;
    const tools = element("div", { class: "tools" }, versionSwitch(message, actions));
    if (message.content) tools.append(copyButton("Copy answer", () => message.content));
    if (message.state !== "failed") tools.append(iconButton("retry", "Answer again", () => actions.retry(message)));
    const facts = told(message.stats ?? {}).map(([text, title]) => element("span", { title }, text));
    const note = { stopped: "stopped", length: "cut off at the token limit" }[/** @type {"stopped"} */ (message.state)];
    const stats = element("div", { class: "stats" }, note && element("span", { class: "note" }, note), ...facts);
    this.foot.replaceChildren(...(message.state === "failed" ? [this.failure()] : []), stats, tools);
  }

  failure() {
    const retry = element("button", { type: "button", onclick: () => this.actions.retry(this.message) }, "Retry");
    const text = element("span", { class: "reason", title: this.message.error }, this.message.error);
    return element("div", { class: "failure", role: "alert" }, text, retry);
  }
}

/** `‹ 1/2 ›`, where there are versions to choose from. @param {Message} message @param {Actions} actions */
function versionSwitch(message, actions) {
  const versions = actions.versions(message);
  if (versions.length < 2) return null;
  const at = versions.indexOf(message);
  const step = (/** @type {number} */ by, /** @type {string} */ label) => {
    const button = iconButton(by < 0 ? "previous" : "next", label, () => actions.choose(versions[at + by]));
    button.disabled = versions[at + by] === undefined;
    return button;
  };
  const count = element("span", { "aria-label": `Version ${at + 1} of ${versions.length}` }, `${at + 1}/${versions.length}`);
  return element("div", { class: "versions" }, step(-1, "Earlier version"), count, step(1, "Later version"));
}

// The messages of a conversation, one below the other, and where the reader is in them.

import { AnswerView, QuestionView } from "./message.js";

/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./message.js").Actions} Actions */

const NEAR = 60; // pixels from the end that still count as the end

export class Thread {
  /**
   * @param {HTMLElement} scroller
   * @param {HTMLElement} list in it
   * @param {HTMLElement} jump the button that leads to the end
   * @param {Actions} actions
   */
  constructor(scroller, list, jump, actions) {
    this.scroller = scroller;
    this.list = list;
    this.jump = jump;
    this.actions = actions;
    /** @type {Array<QuestionView | AnswerView>} */
    this.views = [];
    /** @type {Set<Message>} to be shown anew with the next frame */
    this.stale = new Set();
    this.following = true;
    scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    new ResizeObserver(() => this.following && this.toEnd()).observe(list);
    jump.addEventListener("click", () => this.toEnd());
  }

  /**
   * Shows a path of messages; what is shown of it already stays.
   * @param {Message[]} path
   */
  show(path) {
    let same = 0;
    while (same < path.length && this.views[same]?.message === path[same]) same++;
    for (const view of this.views.splice(same)) view.root.remove();
    for (const message of path.slice(same)) this.views.push(this.view(message));
    this.list.append(...this.views.slice(same).map((view) => view.root));
    this.list.classList.toggle("empty", path.length === 0);
  }

  /** @param {Message} message */
  view(message) {
    return message.role === "user" ? new QuestionView(message, this.actions) : new AnswerView(message, this.actions);
  }

  /** Shows another conversation, from its end, without reading it out. @param {Message[]} path */
  replace(path) {
    this.list.setAttribute("aria-live", "off");
    this.list.replaceChildren();
    this.views = [];
    this.show(path);
    this.toEnd();
    requestAnimationFrame(() => this.list.setAttribute("aria-live", "polite"));
  }

  /** Shows a message anew, once a frame at most. @param {Message} message */
  changed(message) {
    if (this.stale.size === 0) requestAnimationFrame(() => this.refresh());
    this.stale.add(message);
  }

  refresh() {
    for (const view of this.views) if (this.stale.has(view.message)) view.update();
    this.stale.clear();
  }

  scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.scroller;
    this.following = scrollTop + clientHeight > scrollHeight - NEAR;
    this.jump.hidden = this.following;
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  /** Puts the focus where a version was chosen: the button that was pressed is gone with the other one. */
  focusVersions(/** @type {Message} */ message) {
    const root = this.views.find((view) => view.message === message)?.root;
    /** @type {HTMLElement | null | undefined} */ (root?.querySelector(".versions button:enabled"))?.focus();
  }

  /** The last question, to be edited. */
  editLast() {
    const view = this.views.findLast((view) => view instanceof QuestionView);
    if (view instanceof QuestionView) view.edit();
  }
}

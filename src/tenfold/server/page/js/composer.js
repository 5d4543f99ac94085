// Where a message is written, sent, and an answer stopped.

import { byId } from "./element.js";
import { icon } from "./icons.js";
import { grow, sends } from "./message.js";

/**
 * @typedef {object} ComposerActions
 * @property {(text: string) => void} send
 * @property {() => void} stop
 * @property {() => void} editLast
 */

export class Composer {
  /** @param {ComposerActions} actions */
  constructor(actions) {
    this.actions = actions;
    this.field = /** @type {HTMLTextAreaElement} */ (byId("prompt"));
    this.button = /** @type {HTMLButtonElement} */ (byId("send"));
    this.writing = false;
    this.field.addEventListener("input", () => this.update());
    this.field.addEventListener("keydown", (event) => this.key(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.writing) actions.stop();
      else this.send();
    });
    this.setWriting(false);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (sends(event)) {
      event.preventDefault();
      if (!this.writing) this.send();
    } else if (event.key === "ArrowUp" && this.field.value === "" && !this.writing) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  send() {
    const text = this.field.value.trim();
    if (!text) return;
    this.field.value = "";
    this.update();
    this.actions.send(text);
  }

  /** Whether an answer is being written, and the button stops it. @param {boolean} writing */
  setWriting(writing) {
    this.writing = writing;
    const label = writing ? "Stop" : "Send";
    this.button.replaceChildren(icon(writing ? "stop" : "send"));
    this.button.setAttribute("aria-label", label);
    this.button.title = writing ? "Stop (Esc)" : "Send (Enter)";
    this.update();
  }

  update() {
    this.button.disabled = !this.writing && this.field.value.trim() === "";
    grow(this.field);
  }
}

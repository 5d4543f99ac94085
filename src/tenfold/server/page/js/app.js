// The page: what happens when something is pressed, typed or answered.

import { Answering } from "./answering.js";
import { listModels } from "./api.js";
import { Composer } from "./composer.js";
import { asRequest, Conversation } from "./conversation.js";
import { bindSettings, confirmDelete, showSettings } from "./dialogs.js";
import { byId, element } from "./element.js";
import { icon } from "./icons.js";
import { loadSettings, requestOptions, saveSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { Thread } from "./thread.js";

/** @typedef {import("./conversation.js").Message} Message */

const UNAUTHORIZED = 401;

class App {
  /** @param {Store} store */
  constructor(store) {
    this.store = store;
    this.settings = loadSettings();
    this.conversation = Conversation.begin();
    /** @type {Map<string, Conversation>} those whose answers are being written */
    this.busy = new Map();
    this.answering = new Answering((message) => this.changed(message), (message) => store.saveMessage(message));
    this.thread = new Thread(byId("scroller"), byId("thread"), byId("jump"), {
      edit: (message, text) => this.ask(text, message.parent),
      retry: (message) => this.retry(message),
      choose: (message) => this.choose(message),
      versions: (message) => this.conversation.versions(message),
    });
    this.composer = new Composer({
      send: (text) => this.ask(text, this.conversation.path().at(-1)?.id ?? null),
      stop: () => this.answering.stop(this.conversation.id),
      editLast: () => this.thread.editLast(),
    });
    this.sidebar = new Sidebar(byId("conversations"), byId("search"));
    this.bind();
  }

  async start() {
    await this.open();
    await Promise.all([this.listConversations(), this.listModels()]);
  }

  // ---- asking and answering ----

  /** @param {string} text @param {string | null} parent the message it follows */
  async ask(text, parent) {
    if (this.answering.runs(this.conversation.id)) return;
    await this.answer(this.conversation.add("user", parent, { content: text }));
  }

  /** @param {Message} answer that is to get another version; one that came to nothing is replaced */
  async retry(answer) {
    if (this.answering.runs(this.conversation.id)) return;
    const question = answer.parent === null ? undefined : this.conversation.messages.get(answer.parent);
    if (!question) return;
    if (answer.state === "failed" && !answer.content) {
      this.conversation.remove(answer);
      await this.store.removeMessage(answer);
    }
    await this.answer(question);
  }

  /** @param {Message} question */
  async answer(question) {
    const { conversation, settings } = this;
    const path = [...conversation.before(question), question];
    const answer = conversation.add("assistant", question.id, { state: "writing", model: settings.model });
    this.busy.set(conversation.id, conversation);
    const request = { ...requestOptions(settings), messages: asRequest(path, settings.system) };
    const written = this.answering.write(answer, request, settings.apiKey);
    this.thread.show(conversation.path());
    this.thread.toEnd();
    this.showState();
    history.replaceState(null, "", `#${conversation.id}`);
    await this.store.saveMessage(question);
    await this.store.saveEntry(conversation.entry);
    await this.listConversations();
    await written;
    this.ended(conversation, answer);
  }

  /** @param {Conversation} conversation @param {Message} answer */
  ended(conversation, answer) {
    this.busy.delete(conversation.id);
    this.showState();
    if (conversation === this.conversation) byId("status").textContent = STATUS[answer.state ?? "done"];
  }

  /** @param {Message} message */
  changed(message) {
    if (message.conversation === this.conversation.id) this.thread.changed(message);
  }

  /** @param {Message} message */
  async choose(message) {
    if (this.answering.runs(this.conversation.id)) return;
    this.conversation.choose(message);
    this.thread.show(this.conversation.path());
    this.thread.focusVersions(message);
    await this.store.saveEntry(this.conversation.entry);
  }

  // ---- conversations ----

  /** Shows the conversation that the address names, or a new one. */
  async open() {
    const id = location.hash.slice(1);
    if (id && id === this.conversation.id) return;
    const conversation = this.busy.get(id) ?? (await this.load(id)) ?? Conversation.begin();
    if (location.hash.slice(1) !== id) return; // another one was opened meanwhile
    this.conversation = conversation;
    this.thread.replace(this.conversation.path());
    this.showState();
    document.body.classList.remove("drawer");
    if (matchMedia("(hover: hover)").matches) this.composer.field.focus();
  }

  /** @param {string} id @returns {Promise<Conversation | undefined>} */
  async load(id) {
    const entry = id ? (await this.store.entries()).find((entry) => entry.id === id) : undefined;
    return entry && new Conversation(entry, await this.store.messages(id));
  }

  async listConversations() {
    this.sidebar.show(await this.store.entries(), this.conversation.id);
  }

  async rename() {
    const { entry } = this.conversation;
    entry.title = this.title.value.trim() || entry.title;
    this.showState();
    if (this.conversation.messages.size) await this.store.saveEntry(entry);
    await this.listConversations();
  }

  async delete() {
    const { id, entry } = this.conversation;
    if (!(await confirmDelete(entry.title))) return;
    await this.answering.stop(id);
    await this.store.remove(id);
    location.hash = "";
    await this.listConversations();
  }

  /** @param {string} suffix @param {string} text */
  download(suffix, text) {
    const name = this.conversation.entry.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation";
    const href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    element("a", { href, download: `${name}.${suffix}` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  }

  // ---- the frame ----

  get title() {
    return /** @type {HTMLInputElement} */ (byId("title"));
  }

  showState() {
    const { entry, messages } = this.conversation;
    this.title.value = entry.title;
    this.title.hidden = byId("more").hidden = messages.size === 0;
    document.title = entry.title ? `${entry.title} · Tenfold` : "Tenfold";
    this.composer.setWriting(this.answering.runs(entry.id));
    this.sidebar.mark(entry.id);
  }

  async listModels() {
    const select = /** @type {HTMLSelectElement} */ (byId("model"));
    const names = await listModels(this.settings.apiKey).catch((error) => this.complain(error));
    if (!names) return;
    select.replaceChildren(...names.map((name) => element("option", { value: name }, shortName(name))));
    if (!names.includes(this.settings.model)) this.settings.model = names[0] ?? "";
    select.value = this.settings.model;
    select.hidden = names.length === 0;
    byId("notice").hidden = true;
  }

  /** @param {Error & {status?: number}} error */
  complain(error) {
    const secret = error.status === UNAUTHORIZED;
    const act = () => (secret ? showSettings("apiKey") : this.listModels());
    const button = element("button", { type: "button", onclick: act }, secret ? "Enter a key" : "Retry");
    byId("notice").replaceChildren(element("span", {}, secret ? "This server asks for a key" : error.message), button);
    byId("notice").hidden = false;
  }

  bind() {
    const { settings } = this;
    for (const place of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-icon]")))
      place.prepend(icon(/** @type {"plus"} */ (place.dataset.icon)));
    addEventListener("hashchange", () => this.open());
    addEventListener("keydown", (event) => this.key(event));
    byId("model").addEventListener("change", (event) => {
      settings.model = /** @type {HTMLSelectElement} */ (event.target).value;
      saveSettings(settings);
    });
    bindSettings(settings, (name) => {
      if (name === "theme") document.documentElement.dataset.theme = settings.theme;
      if (name === "apiKey") this.listModels();
    });
    this.title.addEventListener("change", () => this.rename());
    this.title.addEventListener("keydown", (event) => event.key === "Enter" && this.composer.field.focus());
    this.bindMenu();
    this.bindSidebar();
  }

  bindMenu() {
    const menu = byId("menu");
    /** @type {Record<string, () => void>} */
    const actions = {
      rename: () => this.title.select(),
      markdown: () => this.download("md", this.conversation.markdown()),
      json: () => this.download("json", JSON.stringify(this.conversation.exported(this.settings.system), null, 1)),
      delete: () => this.delete(),
    };
    for (const button of menu.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        menu.hidePopover();
        actions[button.value]();
      });
    }
  }

  bindSidebar() {
    const { settings } = this;
    document.body.classList.toggle("no-sidebar", !settings.sidebar);
    byId("toggle").addEventListener("click", () => {
      if (matchMedia("(max-width: 760px)").matches) {
        document.body.classList.add("drawer");
        byId("new").focus();
        return;
      }
      settings.sidebar = document.body.classList.toggle("no-sidebar") === false;
      saveSettings(settings);
    });
    byId("shade").addEventListener("click", () => document.body.classList.remove("drawer"));
    byId("new").addEventListener("click", (event) => {
      event.preventDefault();
      this.begin();
    });
  }

  begin() {
    history.pushState(null, "", "#");
    return this.open();
  }

  /** Keys that hold everywhere. @param {KeyboardEvent} event */
  key(event) {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") this.escape();
    else if (event.key === "/" && !typing) this.composer.field.focus();
    else if (event.key === "k" && (event.ctrlKey || event.metaKey)) this.focusSearch();
    else if (event.code === "KeyN" && event.altKey) this.begin();
    else return;
    event.preventDefault();
  }

  escape() {
    if (document.body.classList.contains("drawer")) document.body.classList.remove("drawer");
    else this.answering.stop(this.conversation.id);
  }

  focusSearch() {
    const narrow = matchMedia("(max-width: 760px)").matches;
    document.body.classList.toggle("drawer", narrow);
    document.body.classList.remove("no-sidebar");
    byId("search").focus();
  }
}

/** A name without the folders before it. @param {string} name */
const shortName = (name) => name.split("/").findLast((part) => part !== "") ?? name;

const STATUS = {
  writing: "", done: "The answer is complete", length: "The answer was cut off at the token limit",
  stopped: "Stopped", failed: "The answer failed",
};

Store.open().then(
  (store) => new App(store).start(),
  () => (document.body.textContent = "This page keeps conversations in the browser's database, which is closed to it here."),
);

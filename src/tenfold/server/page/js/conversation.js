// A conversation is a tree: editing a message or asking again adds a version beside it, and nothing is lost.

/**
 * @typedef {object} Stats of an answer
 * @property {number} [firstMs] from asking to the first text
 * @property {number} [writingMs] from the first text to the last
 * @property {number} [reasoningMs] of those, before the answer proper
 * @property {number} [promptTokens]
 * @property {number} [cachedTokens] of the prompt, that the server did not compute
 * @property {number} [tokens] of the answer
 * @property {number} [acceptedTokens] of those, that were drafted
 * @property {number} [draftedTokens]
 */

/**
 * @typedef {object} Message
 * @property {string} id
 * @property {string} conversation
 * @property {string | null} parent the message before it
 * @property {"user" | "assistant"} role
 * @property {string} content
 * @property {string} [reasoning]
 * @property {number} order rises with every message, in all conversations
 * @property {string} [model]
 * @property {"writing" | "done" | "length" | "stopped" | "failed"} [state] of an answer
 * @property {string} [error] one line
 * @property {Stats} [stats]
 */

/**
 * @typedef {object} Entry of the list of conversations
 * @property {string} id
 * @property {string} title
 * @property {number} updated milliseconds since 1970
 * @property {Record<string, string>} chosen by parent ("" for the first message): the version that is shown
 */

const LONGEST_TITLE = 60;
let lastOrder = 0;

/** Rises, also over restarts and between tabs. */
export function nextOrder() {
  lastOrder = Math.max(lastOrder + 1, Date.now());
  return lastOrder;
}

/** A page that came over plain HTTP from another machine has no crypto.randomUUID. */
const newId = () => [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");

export class Conversation {
  /**
   * @param {Entry} entry
   * @param {Message[]} messages
   */
  constructor(entry, messages) {
    this.entry = entry;
    /** @type {Map<string, Message>} */
    this.messages = new Map(messages.map((message) => [message.id, message]));
    /** @type {Map<string, Message[]>} versions by parent, the oldest first */
    this.children = new Map();
    for (const message of [...messages].sort((a, b) => a.order - b.order)) this.hang(message);
  }

  static begin() {
    return new Conversation({ id: newId(), title: "", updated: Date.now(), chosen: {} }, []);
  }

  get id() {
    return this.entry.id;
  }

  /** The messages that are shown, from the first to the last. */
  path() {
    const path = [];
    for (let message = this.choice(null); message; message = this.choice(message.id)) path.push(message);
    return path;
  }

  /** The messages before this one. @param {Message} message */
  before(message) {
    const path = [];
    for (let id = message.parent; id !== null; ) {
      const parent = this.messages.get(id);
      if (!parent) break;
      path.unshift(parent);
      id = parent.parent;
    }
    return path;
  }

  /** What can stand in this message's place, itself included. @param {Message} message */
  versions(message) {
    return this.children.get(message.parent ?? "") ?? [];
  }

  /**
   * Adds a message, and shows it.
   * @param {Message["role"]} role
   * @param {string | null} parent
   * @param {Partial<Message>} rest
   * @returns {Message}
   */
  add(role, parent, rest) {
    const conversation = this.entry.id;
    const message = { id: newId(), conversation, parent, role, content: "", order: nextOrder(), ...rest };
    this.messages.set(message.id, message);
    this.hang(message);
    this.choose(message);
    this.entry.updated = Date.now();
    if (!this.entry.title && role === "user") this.entry.title = titleOf(message.content);
    return message;
  }

  /** @param {Message} message */
  choose(message) {
    this.entry.chosen[message.parent ?? ""] = message.id;
  }

  /** @param {string | null} parent @returns {Message | undefined} */
  choice(parent) {
    const versions = this.children.get(parent ?? "") ?? [];
    return versions.find((message) => message.id === this.entry.chosen[parent ?? ""]) ?? versions.at(-1);
  }

  /** @param {Message} message */
  hang(message) {
    const versions = this.children.get(message.parent ?? "");
    if (versions) versions.push(message);
    else this.children.set(message.parent ?? "", [message]);
  }

  /** Takes an answer back that came to nothing. @param {Message} message */
  remove(message) {
    this.messages.delete(message.id);
    const versions = this.versions(message);
    versions.splice(versions.indexOf(message), 1);
  }

  /** Everything, for a file: `messages` is what is shown, `versions` is all there is. @param {string} system */
  exported(system) {
    const { title, updated } = this.entry;
    const messages = asRequest(this.path(), system);
    return { title, updated: new Date(updated).toISOString(), messages, versions: [...this.messages.values()] };
  }

  /** What is shown, to be read. */
  markdown() {
    const names = { user: "You", assistant: "Answer" };
    const parts = this.path().map(({ role, content }) => `## ${names[role]}\n\n${content}\n`);
    return [`# ${this.entry.title}\n`, ...parts].join("\n");
  }
}

/**
 * Messages as the API has them; answers that came to nothing are left out.
 * @param {Message[]} path
 * @param {string} system prompt
 */
export function asRequest(path, system) {
  const told = path.filter((message) => message.role === "user" || message.content !== "");
  const messages = told.map(({ role, content }) => ({ role: /** @type {string} */ (role), content }));
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

/** The first line of a message, cut between two words. */
function titleOf(/** @type {string} */ text) {
  const line = text.trim().split("\n")[0];
  if (line.length <= LONGEST_TITLE) return line;
  return `${line.slice(0, LONGEST_TITLE).replace(/\s+\S*$/, "")}…`;
}

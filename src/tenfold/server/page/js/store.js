// Conversations in the browser's own database: an entry for the list, and a record for every message, so that saving
// an answer never writes the conversation again, and two tabs don't overwrite each other's.

/** @typedef {import("./conversation.js").Entry} Entry */
/** @typedef {import("./conversation.js").Message} Message */

const NAME = "tenfold-chat", VERSION = 1;

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class Store {
  /** @param {IDBDatabase} database */
  constructor(database) {
    this.database = database;
  }

  /** @returns {Promise<Store>} */
  static async open() {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("entries", { keyPath: "id" });
      request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    return new Store(await result(request));
  }

  /** @returns {Promise<Entry[]>} the latest first */
  async entries() {
    const entries = await result(this.table("entries", "readonly").getAll());
    return entries.sort((a, b) => b.updated - a.updated);
  }

  /** @param {string} conversation @returns {Promise<Message[]>} */
  messages(conversation) {
    return result(this.table("messages", "readonly").index("conversation").getAll(conversation));
  }

  /** @param {Entry} entry */
  saveEntry(entry) {
    return result(this.table("entries", "readwrite").put(entry));
  }

  /** @param {Message} message */
  saveMessage(message) {
    return result(this.table("messages", "readwrite").put(message));
  }

  /** @param {Message} message */
  removeMessage(message) {
    return result(this.table("messages", "readwrite").delete(message.id));
  }

  /** @param {string} conversation */
  async remove(conversation) {
    const transaction = this.database.transaction(["entries", "messages"], "readwrite");
    transaction.objectStore("entries").delete(conversation);
    const messages = transaction.objectStore("messages");
    for (const key of await result(messages.index("conversation").getAllKeys(conversation))) messages.delete(key);
  }

  /** @param {"entries" | "messages"} name @param {IDBTransactionMode} mode */
  table(name, mode) {
    return this.database.transaction(name, mode).objectStore(name);
  }
}

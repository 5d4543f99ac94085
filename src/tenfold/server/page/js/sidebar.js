// The list of conversations: by day, to be searched by title.

import { element } from "./element.js";

/** @typedef {import("./conversation.js").Entry} Entry */

const DAY = 24 * 60 * 60 * 1000;

export class Sidebar {
  /**
   * @param {HTMLElement} list
   * @param {HTMLInputElement} search
   */
  constructor(list, search) {
    this.list = list;
    this.search = search;
    /** @type {Entry[]} */
    this.entries = [];
    this.current = "";
    search.addEventListener("input", () => this.render());
    search.addEventListener("keydown", (event) => this.key(event));
  }

  /** @param {Entry[]} entries the latest first @param {string} current */
  show(entries, current) {
    this.entries = entries;
    this.current = current;
    this.render();
  }

  /** @param {string} current */
  mark(current) {
    this.current = current;
    for (const link of this.list.querySelectorAll("a")) {
      if (link.hash === `#${current}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  render() {
    const wanted = this.search.value.trim().toLowerCase();
    const found = this.entries.filter((entry) => entry.title.toLowerCase().includes(wanted));
    const days = Map.groupBy ? Map.groupBy(found, (entry) => dayOf(entry.updated)) : new Map([["", found]]);
    const parts = [...days].map(([day, entries]) => this.day(day, entries));
    const none = wanted && element("p", { class: "none" }, "No title has that in it");
    this.list.replaceChildren(...(parts.length || !none ? parts : [none]));
  }

  /** @param {string} name @param {Entry[]} entries */
  day(name, entries) {
    const links = entries.map((entry) => {
      const current = entry.id === this.current && "page";
      return element("li", {}, element("a", { href: `#${entry.id}`, "aria-current": current }, entry.title || "Untitled"));
    });
    return element("section", { "aria-label": name }, element("h2", {}, name), element("ul", {}, ...links));
  }

  /** Enter opens the first one found, Escape forgets the search. @param {KeyboardEvent} event */
  key(event) {
    if (event.key === "Enter") this.list.querySelector("a")?.click();
    if (event.key !== "Escape" || !this.search.value) return;
    event.stopPropagation();
    this.search.value = "";
    this.render();
  }
}

/** @param {number} time */
function dayOf(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  if (time >= today - 7 * DAY) return "Last seven days";
  return new Date(time).toLocaleDateString("en", { month: "long", year: "numeric" });
}

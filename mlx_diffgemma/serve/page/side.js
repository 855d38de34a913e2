// The list of conversations, with export and import.

import {FORMAT, imported} from "./conversation.js";
import {button, h, notice} from "./dom.js";
import {chosenFile, download} from "./files.js";
import {all, keep, one} from "./store.js";

export class Side {
  #list = h("ul", {className: "conversations"});
  #current = null;

  constructor(chat) {
    this.chat = chat; // () => the chat part
    this.element = h("section", {className: "kept", ariaLabel: "Conversations"},
      this.#list,
      h("p", {className: "buttons small"},
        button("Export", () => this.export(), {className: "quiet"}),
        button("Import", () => this.import(), {className: "quiet"})));
  }

  mark(id) {
    this.#current = id;
    for (const link of this.#list.querySelectorAll("button[data-id]")) {
      if (link.dataset.id === id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  async refresh() {
    const kept = await all();
    const held = this.#buttons.indexOf(document.activeElement);
    this.#list.replaceChildren(...kept.map((each) => h("li", {},
      button(each.title || "Without a title", async () => (await this.chat()).open(await one(each.id) ?? each), {className: "conversation", data: {id: each.id}, dir: "auto"}),
      button("×", async () => {
        if (confirm(`Delete “${each.title}”? This cannot be undone.`)) (await this.chat()).remove(each);
      }, {className: "quiet", ariaLabel: `Delete ${each.title}`}))));
    this.mark(this.#current);
    if (held >= 0) (this.#buttons[held] ?? this.#buttons.at(-1) ?? this.element.querySelector("button")).focus();
  }

  get #buttons() {
    return [...this.#list.querySelectorAll("button")];
  }

  async export() {
    const conversations = await all();
    const text = JSON.stringify({format: FORMAT, conversations}, null, 1);
    download(text, "conversations.json", "application/json");
    notice(`${conversations.length} conversations are in conversations.json.`);
  }

  async import() {
    const chosen = await chosenFile(".json,application/json");
    if (!chosen) return;
    try {
      const conversations = imported(await chosen.file.text());
      for (const each of conversations) await keep(each);
      notice(`${conversations.length} conversations were imported.`);
    } catch (error) {
      notice(`${chosen.file.name} was not imported: ${error.message}.`, "problem");
    }
    await this.refresh();
  }
}

// Document: a text of which parts are written anew, in place.

import {button, counted, growing, h, notice, say} from "./dom.js";
import {chosenFile, saved} from "./files.js";
import {Proposals} from "./proposals.js";
import {Run} from "./run.js";

const DRAFT = "mlx_diffgemma.document"; // of this tab
const WISHES = ["Shorter", "More formal", "Simpler words", "Fix spelling and grammar"];
const EXAMPLE = "12 13 14 {{gap}} 18 19 20";
const SLOT = /(^|[^\\])(\\\\)*\{\{/;

class DocumentPart {
  name = "document.txt";
  handle = null;
  isDirty = false;
  eol = "\n";
  proposals = null;
  undone = []; // of accepted changes, where the browser's own undo is not there

  constructor() {
    this.pane = h("textarea", {id: "pane", spellcheck: false, dir: "auto", ariaLabel: "The document", placeholder: "Write, paste or open a text."});
    this.title = h("h1", {textContent: this.name});
    this.count = h("span", {className: "faint small"});
    this.wish = h("textarea", {id: "wish", rows: 1, dir: "auto", ariaLabel: "What to do", placeholder: "What to do with it"});
    growing(this.wish);
    this.where = h("fieldset", {className: "choice", ariaLabel: "Where to write"}, ["selection", "cursor", "slots"].map((name) =>
      h("label", {}, h("input", {type: "radio", name: "where", value: name, on: {change: () => { this.isChosen = true; this.look(); }}}), h("span", {}))));
    this.rows = h("select", {ariaLabel: "Proposals"}, [1, 2, 3].map((n) => h("option", {value: n, textContent: counted(n, "proposal")})));
    this.go = h("button", {className: "primary", textContent: "Rewrite"});
    this.wishes = h("p", {className: "examples"}, WISHES.map((text) => button(text, () => { this.wish.value = text; this.run(); }, {className: "example"})));
    this.problem = h("p", {className: "problem", hidden: true, attributes: {role: "alert"}});
    this.form = h("form", {className: "composer", on: {submit: (event) => { event.preventDefault(); this.run(); }}},
      this.where, this.wishes,
      h("div", {className: "field"}, this.wish, this.rows, this.go), this.problem);
    this.review = h("div", {className: "review", hidden: true});
    this.element = h("section", {className: "part document", ariaLabel: "Document"},
      h("header", {className: "toolbar"}, this.title, this.count, h("span", {className: "tools"},
        button("Open", () => this.open()), button("Save", () => this.save()),
        button("Undo", () => this.undo("undo")), button("Redo", () => this.undo("redo")))),
      this.pane, this.review, this.form);
    this.pane.addEventListener("input", () => this.changed());
    this.pane.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.run(); }
    });
    this.wish.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); this.run(); }
    });
    document.addEventListener("selectionchange", () => {
      if (document.activeElement === this.pane) { this.isChosen = false; this.look(); }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.proposals && this.element.isConnected) this.proposals.stop();
    });
    addEventListener("beforeunload", (event) => { if (this.isDirty) event.preventDefault(); });
    this.restore();
    this.look();
  }

  restore() {
    try {
      const kept = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
      this.pane.value = kept?.text ?? EXAMPLE;
      this.name = kept?.name ?? this.name;
      this.eol = kept?.eol ?? "\n";
      this.wish.value = kept ? "" : "Count from 12 to 20.";
    } catch {
      this.pane.value = EXAMPLE;
    }
    this.title.textContent = this.name;
  }

  changed() {
    this.isDirty = true;
    clearTimeout(this.keeping);
    this.keeping = setTimeout(() => {
      try {
        sessionStorage.setItem(DRAFT, JSON.stringify({text: this.pane.value, name: this.name, eol: this.eol}));
      } catch { /* too long to keep; it stays in the page */ }
      this.look();
    }, 300);
  }

  // Shows what can be done where the cursor is.
  look() {
    const {selectionStart: start, selectionEnd: stop, value} = this.pane;
    const slots = SLOT.test(value);
    const words = {
      selection: start === stop ? "Selection" : `Selection (${counted(stop - start, "character")})`,
      cursor: "At the cursor",
      slots: "Slots",
    };
    for (const choice of this.where.querySelectorAll("label")) {
      const field = choice.firstElementChild;
      field.disabled = (field.value === "selection" && start === stop) || (field.value === "slots" && !slots);
      choice.lastElementChild.textContent = words[field.value];
    }
    const now = this.target;
    const still = now && !this.where.querySelector(`[value=${now}]`).disabled;
    if (!this.isChosen || !still) this.where.querySelector(`[value=${start !== stop ? "selection" : slots ? "slots" : "cursor"}]`).checked = true;
    this.go.textContent = {selection: "Rewrite", cursor: "Fill", slots: "Fill the slots"}[this.target];
    this.wish.placeholder = {selection: "What to do with the selection", cursor: "What to write there, or nothing", slots: "What the text is about, or nothing"}[this.target];
    this.wishes.hidden = this.target !== "selection";
    this.count.textContent = counted(value.length, "character");
  }

  get target() {
    return this.where.querySelector(":checked")?.value ?? "cursor";
  }

  shown() {
    this.look();
  }

  // Writing

  fail(message) {
    this.problem.hidden = !message;
    this.problem.textContent = message;
  }

  run() {
    this.look();
    const text = this.pane.value, {target} = this, told = this.wish.value.trim();
    let start = 0, stop = text.length;
    this.fail("");
    if (target === "selection" && !told) return this.fail("Say what to do with the selection.");
    if (!text.trim()) return this.fail("There is no text to write in.");
    if (target === "selection") [start, stop] = [this.pane.selectionStart, this.pane.selectionEnd];
    if (target === "cursor") start = stop = this.pane.selectionEnd;
    const n = Number(this.rows.value);
    const body = target === "slots"
      ? {n, fill: {template: text, ...(told && {prompt: told})}}
      : {n, edit: {document: text, start: characters(text, start), stop: characters(text, stop), ...(told && {instruction: told})}};
    const run = new Run(target === "slots" ? "fill" : "edit", body, told || "Fill");
    this.proposals = new Proposals(run, {text, start, stop, isTemplate: target === "slots"}, {
      accept: (replacement) => this.accept(start, stop, replacement),
      close: () => this.close(),
      again: () => { this.close(); this.run(); },
      fail: (message) => { this.close(); this.fail(message); },
    });
    this.review.replaceChildren(this.proposals.element);
    this.review.hidden = false;
    this.pane.hidden = this.form.hidden = true;
    this.proposals.go();
  }

  close() {
    this.proposals?.stop();
    this.proposals = null;
    this.review.replaceChildren();
    this.review.hidden = true;
    this.pane.hidden = this.form.hidden = false;
    this.pane.focus();
  }

  accept(start, stop, replacement) {
    this.close();
    this.pane.setSelectionRange(start, stop);
    this.put(start, stop, replacement);
    this.pane.setSelectionRange(start, start + replacement.length);
    this.isChosen = false;
    this.changed();
    this.look();
    say("Accepted.");
  }

  // Puts a text in, so that the browser's own undo knows of it.
  put(start, stop, text) {
    const before = this.pane.value;
    const isPut = text ? document.execCommand("insertText", false, text) : document.execCommand("delete");
    const after = before.slice(0, start) + text + before.slice(stop);
    if (isPut && this.pane.value === after) return;
    this.pane.value = after;
    this.undone.push(before);
  }

  undo(command) {
    if (this.proposals) return;
    this.pane.focus();
    const before = this.pane.value;
    document.execCommand(command);
    if (command === "undo" && this.pane.value === before && this.undone.length) this.pane.value = this.undone.pop();
    this.changed();
    this.look();
  }

  // Files

  async open() {
    if (this.isDirty && !confirm("Changes of this document are not saved. Open another one?")) return;
    let chosen;
    try {
      chosen = await chosenFile("");
      if (!chosen) return;
      const bytes = await chosen.file.arrayBuffer();
      const text = new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(bytes);
      this.load(text, chosen.file.name, chosen.handle);
    } catch (error) {
      notice(error instanceof TypeError ? `${chosen.file.name} is not a text in UTF-8.` : `The file was not opened: ${error.message}`, "problem");
    }
  }

  load(text, name, handle = null) {
    if (this.proposals) this.close();
    const ends = text.match(/\r\n|\n|\r/g) ?? [];
    this.eol = ends.length && ends.every((end) => end === "\r\n") ? "\r\n" : "\n";
    if (this.eol === "\n" && ends.some((end) => end !== "\n")) {
      notice(`${name} mixes kinds of line ends; saving writes all of them as line feeds.`);
    } else notice("");
    this.pane.value = text;
    [this.name, this.handle, this.isDirty, this.undone] = [name, handle, false, []];
    this.title.textContent = name;
    this.pane.setSelectionRange(0, 0);
    this.changed();
    this.isDirty = false;
    this.look();
  }

  async save() {
    const text = this.eol === "\r\n" ? this.pane.value.replaceAll("\n", "\r\n") : this.pane.value;
    try {
      const {handle, isSaved} = await saved(text, this.name, "text/plain;charset=utf-8", this.handle);
      if (!isSaved) return;
      this.handle = handle;
      if (handle) this.title.textContent = this.name = handle.name;
      this.isDirty = false;
      notice(`${this.name} is saved.`);
    } catch (error) {
      notice(`${this.name} was not saved: ${error.message}`, "problem");
    }
  }
}

// Counts the characters (code points) of a text before an offset; the server counts so.
export function characters(text, offset) {
  let count = 0;
  for (let i = 0; i < offset; count++) i += text.codePointAt(i) > 0xffff ? 2 : 1;
  return count;
}

export async function part() {
  return new DocumentPart();
}

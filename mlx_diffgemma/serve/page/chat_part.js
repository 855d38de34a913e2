// Chat: conversations whose answers settle in place.

import {added, lastOf, messages, newConversation, parentOf, path, titleOf} from "./conversation.js";
import {button, growing, h, notice, say, stopping} from "./dom.js";
import {pictures} from "./images.js";
import {Run, runs} from "./run.js";
import {server} from "./server.js";
import {settings} from "./settings.js";
import {forget, keep, one, stored} from "./store.js";
import {assistantTurn, SettlingTurn, statsOf, toolTurn, userTurn} from "./turns.js";

const CURRENT = "mlx_diffgemma.conversation"; // of this tab
const TOYS = [
  ["A Sudoku", "Sudoku:\n2..563\n536214\n654.3.\n.23645\n4..3.1\n..5.26"],
  ["Count", "Count from 38 to 63."],
  ["Sort", "Sort: 6 3 1 7 0 6"],
  ["Squares as a table", "Squares from 4 to 6."],
];
const EXAMPLES = [
  ["Explain", "Why is the sky blue? Answer in three short paragraphs."],
  ["A table", "Compare bubble sort, merge sort and quicksort in a table."],
  ["Code", "Write a Python function that checks whether a text is a palindrome."],
  ["A formula", "State the quadratic formula and derive it."],
];

class ChatPart {
  conversation = newConversation();
  running = new Map(); // conversation id -> {run, turn, conversation, view}
  ran = new WeakMap(); // turn -> its run
  edited = null; // {turn, element}: a turn with what is typed to take its place

  constructor(app) {
    this.app = app;
    this.turns = h("div", {className: "turns"});
    this.field = h("textarea", {id: "message", rows: 1, placeholder: "Write a message", ariaLabel: "Message", dir: "auto"});
    this.grow = growing(this.field);
    this.send = h("button", {className: "primary", textContent: "Send"});
    this.stop = button("Stop", stopping(() => this.running.get(this.conversation.id)?.run.stop()), {hidden: true, className: "primary"});
    this.images = pictures(this.field, () => path(this.conversation).flatMap((turn) => turn.images ?? []));
    this.strip = h("p", {className: "faint small strip"});
    const form = h("form", {className: "composer", on: {submit: (event) => { event.preventDefault(); this.submit(); }}},
      this.images.strip, h("div", {className: "field"}, this.images.button, this.field, this.send, this.stop), this.strip);
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    this.title = h("h1", {textContent: "Chat", dir: "auto"});
    this.element = h("section", {className: "part chat", ariaLabel: "Chat"},
      h("header", {className: "toolbar"}, this.title, h("span", {className: "tools"},
        button("New", () => this.open(newConversation())),
        this.list = button("Conversations", () => this.openList(), {className: "narrow-only", attributes: {"aria-expanded": "false", "aria-controls": "side-part"}}))),
      this.turns, form);
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]") || !this.element.isConnected) return;
      if (this.list.ariaExpanded === "true") {
        app.openSide(false);
        this.list.focus();
      } else this.running.get(this.conversation.id)?.run.stop();
    });
    stored.addEventListener("change", ({detail}) => this.changedElsewhere(detail));
    settings.addEventListener("change", () => this.showStrip());
    this.showStrip();
  }

  async begin() {
    const id = sessionStorage.getItem(CURRENT);
    const found = id ? await one(id) : null;
    this.show(found ?? this.conversation);
  }

  shown() {
    this.images.offer(this.app.facts?.images ?? null);
    this.grow();
    this.focusField();
  }

  open(conversation) {
    this.show(conversation);
    this.app.openSide(false);
    this.field.focus();
  }

  openList() {
    const isOpen = this.list.ariaExpanded !== "true";
    this.app.openSide(isOpen);
    if (isOpen) document.querySelector("#side .kept button").focus();
  }

  show(conversation = this.conversation) {
    const focus = this.focusNow();
    if (conversation !== this.conversation) this.edited = null;
    this.conversation = conversation;
    sessionStorage.setItem(CURRENT, conversation.id);
    const turns = path(conversation), under = this.running.get(conversation.id);
    this.title.textContent = conversation.title || "Chat";
    if (!turns.length) this.turns.replaceChildren(this.welcome());
    else this.turns.replaceChildren(...turns.map((turn, i) => this.view(turn, i === turns.length - 1, under)));
    this.stop.hidden = !under;
    this.send.hidden = Boolean(under);
    this.app.side.mark(conversation.id);
    focus();
  }

  // Returns what puts the focus back once the turns are made anew: on the same control of the turn
  // at the same place, else on another one there.
  focusNow() {
    const held = document.activeElement ?? document.body, turn = held.closest(".turn");
    if (!turn && held !== this.send && held !== this.stop) return () => {};
    const at = turn ? [...this.turns.children].indexOf(turn) : -1;
    const name = turn?.querySelector(".editing") ? "Edit" : turn ? nameOf(held) : "Retry";
    return () => {
      if (held.isConnected && !held.hidden) return held.focus({preventScroll: true});
      if (!turn && this.focusField()) return;
      if (!this.stop.hidden && (!turn || at === this.turns.childElementCount - 1)) return this.stop.focus({preventScroll: true});
      const there = [...this.turns.children].at(at)?.querySelectorAll("button:enabled, a, summary") ?? [];
      ([...there].find((each) => nameOf(each) === name) ?? there[0] ?? this.field).focus({preventScroll: true});
    };
  }

  // A field that gets the focus opens the keyboard of a telephone, which nobody has asked for.
  focusField() {
    if (!matchMedia("(hover: hover)").matches) return false;
    this.field.focus({preventScroll: true});
    return true;
  }

  view(turn, isLast, under) {
    if (under?.turn === turn) return under.view.element;
    if (this.edited?.turn === turn) return this.edited.element; // what is typed there stays
    const siblings = parentOf(this.conversation, turn).children;
    if (turn.role === "user") return userTurn(turn, siblings, this);
    return turn.role === "tool" ? toolTurn(turn) : assistantTurn(turn, siblings, this, isLast);
  }

  welcome() {
    const isToy = this.app.facts?.model === "bundled";
    const examples = (isToy ? TOYS : EXAMPLES).map(([name, text]) => button(name, () => {
      this.field.value = text;
      this.grow();
      this.field.focus();
    }, {className: "example"}));
    return h("div", {className: "welcome"},
      h("h2", {textContent: "Text that comes out of noise"}),
      h("p", {textContent: "The model writes a whole canvas of tokens at once and refines it step by step. The warmer a token's colour, the less sure it is; a dotted one is drawn again."}),
      isToy ? h("p", {className: "faint", textContent: "This is the small model that comes with mlx_diffgemma. It knows ten toy tasks, and one question at a time: begin a new conversation for each."}) : null,
      h("p", {className: "examples"}, examples));
  }

  showStrip() {
    const line = settings.line();
    this.strip.replaceChildren(h("span", {textContent: "Enter sends, Shift+Enter starts a line, Esc stops. "}), line ? h("a", {href: "#settings", textContent: line}) : "");
  }

  // What turns can do

  submit() {
    if (this.running.has(this.conversation.id)) return;
    if (this.images.reading) {
      this.images.reading.then((isWhole) => { if (isWhole) this.submit(); });
      return;
    }
    const text = this.field.value, images = this.images.take();
    if (!text.trim() && !images.length) return;
    this.field.value = "";
    this.grow();
    this.ask(lastOf(this.conversation), {role: "user", text, ...(images.length && {images})});
  }

  edit(turn, text, images) {
    if (!text.trim() && !images.length) return;
    if (this.running.has(this.conversation.id)) return notice("An answer is being written: wait for it, or stop it first.");
    notice("");
    this.edited = null;
    this.ask(parentOf(this.conversation, turn), {role: "user", text, ...(images.length && {images})});
  }

  retry(turn) {
    if (!this.running.has(this.conversation.id)) this.answer(parentOf(this.conversation, turn));
  }

  results(turn, contents) {
    const results = turn.calls.map((call, i) => ({id: call.id, name: call.name, content: contents[i]}));
    this.ask(turn, {role: "tool", results});
  }

  choose(turn, index) {
    if (this.running.has(this.conversation.id)) return;
    parentOf(this.conversation, turn).chosen = index;
    keep(this.conversation).then(() => this.app.side.refresh());
    this.show();
  }

  hasRun(turn) {
    return runs.includes(this.ran.get(turn));
  }

  inside(turn) {
    this.app.inside = this.ran.get(turn);
  }

  async ask(parent, turn) {
    const {conversation} = this;
    const asked = added(parent, turn);
    conversation.title ||= titleOf(turn);
    this.answer(asked);
    await this.keep(conversation);
  }

  async answer(parent) {
    const {conversation} = this;
    const told = messages(conversation, parent, settings.get("system"));
    const turn = added(parent, {role: "assistant", text: "", thought: "", calls: [], state: "running"});
    const thinking = settings.get("thinking");
    const run = new Run("chat", {chat: {
      messages: told,
      ...(settings.tools && {tools: settings.tools}),
      ...(thinking !== null && {chat_template_kwargs: {enable_thinking: thinking}}),
    }}, parent.text ?? "");
    const view = new SettlingTurn(run, stopping(() => run.stop()), () => { if (this.conversation === conversation) this.follow(); });
    this.running.set(conversation.id, {run, turn, view});
    this.ran.set(turn, run);
    this.show();
    this.follow(true);
    await run.go(() => view.update());
    this.running.delete(conversation.id);
    finish(turn, run);
    if (conversation === this.conversation) {
      this.show();
      this.follow();
    }
    if (turn.state === "failed") say(`Not finished: ${turn.error}`);
    await this.keep(conversation);
  }

  // Keeps the end of the answer in sight, unless somebody has scrolled away from it.
  follow(always = false) {
    const left = document.documentElement.scrollHeight - innerHeight - scrollY;
    if (always || left < 240) scrollTo({top: document.documentElement.scrollHeight});
  }

  async keep(conversation) {
    try {
      await keep(conversation);
    } catch (error) {
      notice(`This conversation is not kept: ${error.message}`, "problem");
    }
    if (conversation === this.conversation) sessionStorage.setItem(CURRENT, conversation.id);
    await this.app.side.refresh();
  }

  async remove(conversation) {
    this.running.get(conversation.id)?.run.stop();
    await forget(conversation.id);
    if (conversation.id === this.conversation.id) this.open(newConversation());
    await this.app.side.refresh();
  }

  async changedElsewhere(id) {
    if (id === this.conversation.id && !this.running.has(id)) {
      const found = await one(id);
      if (found && found.version > this.conversation.version) this.show(found);
    }
    await this.app.side.refresh();
  }
}

// Takes the end of a run into its turn. A stopped answer keeps the last draft.
function finish(turn, run) {
  const row = run.rows[0];
  turn.state = run.state;
  if (run.error) turn.error = run.error.message;
  if (!row) return;
  const draft = run.state === "stopped" ? row.draft : null;
  turn.text = row.answer + (draft ? run.text(draft, "a") : "");
  turn.thought = row.thought + (draft ? run.text(draft, "t") : "");
  turn.calls = row.calls.map((call) => ({id: call.id, name: call.name, arguments: call.arguments}));
  turn.stats = statsOf(run);
  if (row.finished?.reason === "length") turn.state = "length";
}

const nameOf = (control) => control.ariaLabel || control.textContent;

export async function part(app) {
  const made = new ChatPart(app);
  await made.begin();
  server.addEventListener("change", () => { if (server.state === "ready" && !path(made.conversation).length) made.show(); });
  return made;
}

// Proposals for a part of a text, side by side, as rows of one run: settling between pinned text,
// then as changes to accept.

import {button, counted, eachFrame, h, say, stopping} from "./dom.js";
import {Canvas} from "./settle.js";
import {statsOf} from "./turns.js";

const NEAR = 1200; // characters of the pinned text that are shown on each side
const MOST_COMPARED = 20_000; // characters of a change that are compared word by word

// Returns the change from one text to another as elements: <del> and <ins>.
export async function difference(before, after) {
  if (before === after) return [h("span", {textContent: after})];
  let parts = [{removed: true, value: before}, {added: true, value: after}];
  if (before && after && before.length + after.length <= MOST_COMPARED) {
    if (!globalThis.Diff) await import("./vendor/diff/diff.min.js");
    parts = globalThis.Diff.diffWordsWithSpace(before, after, {timeout: 300}) ?? parts;
  }
  return parts.filter((part) => part.value).map((part) =>
    h(part.removed ? "del" : part.added ? "ins" : "span", {textContent: part.value}));
}

export class Proposals {
  #cards = [];
  update = eachFrame(() => this.#draw());

  // `place` is {text, start, stop, isTemplate}; `act` has accept, close, again and fail.
  constructor(run, place, act) {
    Object.assign(this, {run, place, act});
    const {text, start, stop, isTemplate} = place;
    this.cards = h("div", {className: "proposals", attributes: {"aria-busy": "true"}});
    this.state = h("span", {className: "stats", textContent: "Reading"});
    this.stopButton = button("Stop", stopping(() => this.stop()), {className: "primary"});
    this.againButton = button("Again", act.again, {hidden: true});
    this.notes = h("div", {className: "notes"}); // of all rows, each once
    this.closeButton = button("Keep the old text", act.close, {hidden: true});
    this.element = h("div", {className: "reviewed"},
      isTemplate ? null : pinned(text.slice(0, start), -NEAR),
      this.cards,
      isTemplate ? null : pinned(text.slice(stop), NEAR),
      h("p", {className: "buttons"}, this.stopButton, this.closeButton, this.againButton, this.state), this.notes);
  }

  async go() {
    this.stopButton.focus();
    await this.run.go(() => this.update());
    this.#draw();
    this.stopButton.hidden = true;
    this.againButton.hidden = this.closeButton.hidden = false;
    this.cards.removeAttribute("aria-busy");
    if (this.run.state === "failed") return this.act.fail(this.run.error.message);
    if (this.run.state === "stopped" && !this.run.rows.some((row) => row.result)) return this.act.close();
    this.state.textContent = statsOf(this.run);
    await Promise.all(this.run.rows.map((row, i) => this.#finish(row, this.#cards[i])));
    this.#cards[0]?.accept.focus();
    say(counted(this.run.rows.filter((row) => row.result).length, "proposal") + ": " + this.run.rows.map((row) => row.result?.text ?? "").join(". "));
  }

  stop() {
    this.run.stop();
  }

  #draw() {
    if (!this.#cards.length && this.run.rows.length) {
      this.#cards = this.run.rows.map((row, i) => this.#card(i));
      this.cards.replaceChildren(...this.#cards.map((card) => card.element));
    }
    let words = "";
    this.run.rows.forEach((row, i) => {
      const step = row.last;
      if (!step || row.result) return;
      const looks = step.trial && !step.trial.final;
      const tokens = this.run.tokens(step, "atc");
      const inside = tokens.filter((token) => !token.pinned);
      this.#cards[i].canvas.draw(this.place.isTemplate ? tokens : looks ? tokens : inside);
      this.#cards[i].element.classList.toggle("looking", Boolean(looks));
      words ||= looks ? "finding the length" : `step ${step.step + 1} of at most ${this.run.maxSteps}`;
    });
    if (words) this.state.textContent = words;
  }

  #card(i) {
    const canvas = new Canvas();
    const body = h("div", {className: "proposed", dir: "auto"}, canvas.element);
    const accept = button("Accept", () => {}, {className: "primary", hidden: true});
    const about = h("span", {className: "faint small"});
    const element = h("section", {className: "proposal", ariaLabel: `Proposal ${i + 1}`}, body, h("footer", {}, accept, about));
    return {element, canvas, body, accept, about};
  }

  async #finish(row, card) {
    card.element.classList.remove("looking");
    if (!row.result) {
      card.body.replaceChildren(h("span", {className: "faint", textContent: "Stopped."}));
      return;
    }
    const {text, slots, notes} = row.result;
    const before = this.place.text.slice(this.place.start, this.place.stop);
    card.body.replaceChildren(...(this.place.isTemplate ? withSlots(this.place.text, text, slots) : await difference(before, text)));
    card.accept.hidden = false;
    card.accept.onclick = () => this.act.accept(text);
    const sure = Object.values(slots).map((slot) => slot.certainty);
    card.about.textContent = `certainty ${Math.round(100 * Math.min(...sure))}%`;
    const told = new Set([...this.notes.children].map((each) => each.textContent));
    for (const note of notes) if (!told.has(note)) this.notes.append(h("p", {className: "faint small", textContent: note}));
  }
}

// Returns a filled template with the slots' texts as changes. The literal text around them is the
// same in both, in order.
function withSlots(template, filled, slots) {
  const found = [];
  let at = 0;
  for (const slot of Object.values(slots)) {
    const start = slot.text ? filled.indexOf(slot.text, at) : at;
    if (start < 0) return [h("span", {textContent: filled})];
    const before = filled.slice(at, start);
    found.push(h("span", {className: "given", textContent: before}), h("ins", {textContent: slot.text}));
    at = start + slot.text.length;
  }
  return [...found, h("span", {className: "given", textContent: filled.slice(at)})];
}

// Returns pinned text, which stays as it is; only what is near to the place is shown.
function pinned(text, near) {
  if (!text) return null;
  const part = near < 0 ? text.slice(near) : text.slice(0, near);
  const more = text.length - part.length;
  const note = more > 0 ? h("p", {className: "faint small", textContent: `${counted(more, "more character")}, pinned`}) : null;
  const shown = h("div", {className: "pinned-text", dir: "auto", tabIndex: 0, textContent: part});
  if (near < 0) requestAnimationFrame(() => { shown.scrollTop = shown.scrollHeight; });
  return h("div", {className: "pinned-side", ariaLabel: near < 0 ? "Pinned text before" : "Pinned text after", attributes: {role: "group"}},
    near < 0 ? note : null, shown, near < 0 ? null : note);
}

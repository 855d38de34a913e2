// A canvas that settles: a span for each token, coloured by certainty. Redrawing changes only what
// has changed.

export const BANDS = [250, 500, 750, 950]; // thousandths; as the trace page's

export function band(certainty) {
  return BANDS.reduce((count, limit) => count + (certainty >= limit), 0);
}

const still = matchMedia("(prefers-reduced-motion: reduce)");
const FRESH_MS = 130; // for which a token that has changed is faint
const RIGHT_TO_LEFT = /[\u0590-\u08ff\u200f\u202b\u202e\u2067\ufb1d-\ufdff\ufe70-\ufefc\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;

export class Canvas {
  #spans = [];
  #texts = [];
  #classes = [];
  #shown = 0;
  #waiting = 0;

  constructor(properties = {}) {
    this.element = Object.assign(document.createElement("span"), {className: "settling", ...properties});
    this.element.setAttribute("aria-hidden", "true"); // settled text is said, drafts are not
  }

  // Draws the tokens of `Run.tokens`.
  draw(tokens) {
    while (this.#spans.length < tokens.length) {
      const span = document.createElement("span");
      span.append("");
      this.#spans.push(span);
      this.#texts.push(null);
      this.#classes.push("");
    }
    tokens.forEach((token, i) => {
      const span = this.#spans[i];
      const changed = this.#texts[i] !== token.text;
      let name = token.pinned ? "given" : `b${band(token.certainty)}${token.accepted ? "" : " renoised"}`;
      if (changed && !token.pinned) name += " new";
      if (changed) {
        span.firstChild.data = this.#texts[i] = token.text; // the node stays: a new one costs a layout of its own
        // Where some tokens run the other way, each keeps its place; elsewhere that costs a tenth of a redraw.
        if (RIGHT_TO_LEFT.test(token.text)) this.element.classList.add("mixed");
      }
      if (name !== this.#classes[i]) span.className = this.#classes[i] = name;
    });
    if (tokens.length > this.#shown) this.element.append(...this.#spans.slice(this.#shown, tokens.length));
    for (let i = tokens.length; i < this.#shown; i++) {
      this.#spans[i].remove();
      this.#texts[i] = null;
      this.#classes[i] = "";
    }
    this.#shown = tokens.length;
    this.#condense();
  }

  // Lets what has changed be faint for a moment.
  #condense() {
    if (still.matches) return;
    clearTimeout(this.#waiting);
    this.element.classList.add("fresh");
    this.#waiting = setTimeout(() => this.element.classList.remove("fresh"), FRESH_MS);
  }

  clear() {
    this.draw([]);
  }
}

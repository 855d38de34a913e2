// A canvas that settles: a span for each token, coloured by certainty. Redrawing changes only what
// has changed.

export const BANDS = [250, 500, 750, 950]; // thousandths; as the trace page's

export function band(certainty) {
  return BANDS.reduce((count, limit) => count + (certainty >= limit), 0);
}

const still = matchMedia("(prefers-reduced-motion: reduce)");
const FRESH_MS = 130; // for which a token that has changed is faint

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
      this.#spans.push(document.createElement("span"));
      this.#texts.push(null);
      this.#classes.push("");
    }
    tokens.forEach((token, i) => {
      const span = this.#spans[i];
      const changed = this.#texts[i] !== token.text;
      let name = token.pinned ? "given" : `b${band(token.certainty)}${token.accepted ? "" : " renoised"}`;
      if (changed && !token.pinned) name += " new";
      if (changed) span.textContent = this.#texts[i] = token.text;
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

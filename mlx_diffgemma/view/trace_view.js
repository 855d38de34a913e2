// A run step by step: of the trace page, which holds this file, and of the server's page.

const SVG = "http://www.w3.org/2000/svg";
const SPEEDS = [1, 3, 8, 20]; // steps a second

export function element(name, properties = {}, ...children) {
  const {attributes = {}, ...own} = properties;
  const made = Object.assign(document.createElement(name), own);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Nothing invisible: control, format and unpaired characters by number, marks on a circle.
export function visible(text) {
  return text
    .replace(/\t/g, "⇥")
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => c === "\n" ? c : "‹U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "›")
    .replace(/^\p{M}/u, (c) => "◌" + c);
}

function percent(share) {
  return share === 0 ? "<0.1%" : (share * 100).toFixed(1) + "%";
}

function trial(found) {
  if (!found) return "";
  const lengths = Object.entries(found.lengths).map(([name, n]) => `${visible(name)} ${n}`).join(", ");
  if (found.final) return ` (final text, tokens of slots: ${lengths})`;
  return " (lengths of slots are looked for)";
}

function label(step) {
  const all = step.canvas.steps.at(-1).step + 1;
  const attempt = step.attempt ? `, drawn again (${step.attempt})` : "";
  return `canvas ${step.canvas.canvas + 1}${trial(step.canvas.trial)}, step ${step.step + 1} of ${Math.max(all, step.step + 1)}${attempt}`;
}

function numbers(step) {
  return `${step.accepted_tokens} of ${step.free_tokens} accepted, mean entropy ${step.mean_entropy.toFixed(3)} nats`;
}

// Shows runs in an element. A run is an object as trace.py makes it, with its words and columns
// unpacked: `columns` has, for the positions of all steps one behind another, `accepted` (bit 0
// accepted, bit 1 pinned), `certainty` and `entropy` in `thousandths`, `draft` as the place in
// `words`, and `candidates`, pairs of such places and probabilities, the likeliest first.
export class TraceView {
  constructor(root) {
    this.root = root;
    this.spans = [];
    this.current = this.roving = 0;
    this.timer = this.tipOwner = null;
    this.listening = new AbortController();
    this.build();
  }

  build() {
    const id = (name, tag, properties = {}, ...children) => {
      this[name] = element(tag, {id: name, ...properties}, ...children);
      return this[name];
    };
    const button = (name, text, said) =>
      id(name, "button", {type: "button", textContent: text, ...(said && {ariaLabel: said})});
    this.chart = drawn("svg", {id: "chart", viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-labelledby": "chartname"});
    const line = (kind) => drawn("svg", {viewBox: "0 0 30 8", "aria-hidden": "true"}, drawn("line", {class: kind, x1: 0, y1: 4, x2: 30, y2: 4}));
    const kbd = (text) => element("kbd", {textContent: text});
    this.speed = element("select", {id: "speed"}, ...SPEEDS.map((n) =>
      element("option", {value: n, textContent: `${n} step${n > 1 ? "s" : ""}/s`, selected: n === 3})));
    this.root.replaceChildren(
      element("header", {}, element("h1", {textContent: "A run, step by step"}),
        id("aboutLine", "p", {id: "about", className: "faint"}), id("prompt", "p", {className: "prompt"})),
      id("problem", "p", {hidden: true, attributes: {role: "alert"}}),
      element("div", {className: "controls"},
        button("previous", "◀", "previous step"), button("playing", "▶ play"), button("next", "▶", "next step"),
        element("label", {}, "speed ", this.speed),
        id("slider", "input", {type: "range", min: 0, max: 0, value: 0, step: 1, ariaLabel: "step of the run"})),
      id("now", "output", {attributes: {for: "slider"}}),
      this.chart,
      element("div", {className: "key", id: "chartname"},
        element("span", {}, line("entropy"), id("entropykey", "span", {textContent: "mean entropy"})),
        element("span", {}, line("share"), "accepted share, 0 to 100%")),
      id("legend", "ul", {className: "legend", ariaLabel: "what the colours and lines mean"}),
      id("canvas", "div", {attributes: {role: "group", tabindex: "-1"}, ariaLabel: "the canvas at this step"},
        id("before", "span"), id("tokens", "span", {attributes: {role: "list"}, ariaLabel: "tokens"})),
      id("tip", "div", {hidden: true, attributes: {role: "tooltip"}}),
      element("p", {className: "faint"}, "Keys: ", kbd("←"), " ", kbd("→"), " step, ", kbd("Home"), " ", kbd("End"),
        " first and last, ", kbd("space"), " play. ", kbd("Tab"), " into the canvas: ", kbd("←"), " ", kbd("→"),
        " go from token to token, ", kbd("↑"), " ", kbd("↓"), " from step to step, ", kbd("Esc"), " closes what is shown."),
      element("details", {}, element("summary", {textContent: "The answer"}), id("answer", "p")));
    this.playing.id = "play";
  }

  // Tells what is run; without its steps.
  about(run) {
    const given = Object.entries(run.settings).map(([name, value]) => `${name} ${visible(String(value))}`);
    const cut = run.complete ? [] : ["the run was cut short"];
    this.aboutLine.textContent = [visible(run.model), `seed ${run.seed}`, ...given, ...cut].join(" · ");
    this.prompt.textContent = "Prompt: " + visible(String(run.prompt));
    this.answer.textContent = visible(run.text.answer);
  }

  // Shows a run from its first step; false if it has none.
  show(run) {
    this.run = run;
    this.steps = run.canvases.flatMap((canvas, index) => canvas.steps.map((step) => ({...step, canvas, index})));
    this.about(run);
    if (!this.steps.length) {
      this.fail("The run has no step to show.");
      return false;
    }
    let start = 0;
    for (const step of this.steps) {
      step.start = start;
      start += step.width;
    }
    this.controls = new Set(run.controls);
    this.makeTokens();
    this.drawLegend();
    this.drawChart();
    this.listen();
    this.showStep(0);
    return true;
  }

  fail(message) {
    this.problem.textContent = message;
    this.problem.hidden = false;
  }

  // Ends it: it listens and plays no more.
  close() {
    this.play(false);
    this.listening.abort();
  }

  share(value) {
    return value / this.run.thousandths;
  }

  band(value) {
    return this.run.bands.filter((limit) => this.share(value) >= limit).length;
  }

  inCanvas(word) {
    return visible(this.run.words[word]).replace(/\n/g, "⏎\n");
  }

  inTip(word) {
    return visible(this.run.words[word]).replace(/\n/g, "⏎").replace(/ /g, "␣");
  }

  showStep(index) {
    const {steps, spans} = this, columns = this.run.columns;
    const canvasBefore = steps[this.current].index;
    this.current = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[this.current];
    this.slider.value = this.current;
    this.slider.setAttribute("aria-valuetext", label(step));
    this.now.textContent = `${label(step)}: ${numbers(step)}`;
    this.previous.disabled = this.current === 0;
    this.next.disabled = this.current === steps.length - 1;
    this.before.textContent = this.run.canvases.slice(0, step.index).filter((c) => !c.trial || c.trial.final)
      .map((c) => visible(c.text ?? "")).join("");
    spans.forEach((span, i) => {
      span.hidden = i >= step.width;
      if (span.hidden) return;
      const at = step.start + i, word = columns.draft[at];
      const pinned = columns.accepted[at] & 2;
      const accepted = columns.accepted[at] & 1 ? "accepted" : "renoised";
      const text = this.inCanvas(word);
      if (span.textContent !== text) span.textContent = text;
      span.className = `token ${pinned ? "pinned" : `b${this.band(columns.certainty[at])} ${accepted}`}${this.controls.has(word) ? " control" : ""}`;
    });
    if (step.index !== canvasBefore) this.canvas.scrollTop = spans[0].offsetTop - 48;
    if (this.roving >= step.width) this.setRoving(0);
    if (this.tipOwner !== null && this.tipOwner >= step.width) this.hideTip();
    else if (this.tipOwner !== null) this.showTip(this.tipOwner);
    const x = this.chartX(this.current);
    this.mark.setAttribute("x1", x);
    this.mark.setAttribute("x2", x);
  }

  showTip(i) {
    const step = this.steps[this.current], at = step.start + i, {tip, spans} = this, columns = this.run.columns;
    const state = columns.accepted[at] & 2 ? "pinned: given text" : columns.accepted[at] & 1 ? "accepted" : "renoised";
    const rows = columns.candidates.map(([ids, shares]) => {
      const bar = element("div", {className: "bar"});
      bar.style.width = `${Math.max(1, this.share(shares[at]) * 80)}px`;
      return element("tr", {},
        element("td", {className: "word", textContent: this.inTip(ids[at])}),
        element("td", {className: "number", textContent: percent(this.share(shares[at]))}),
        element("td", {}, bar));
    });
    tip.replaceChildren(
      element("strong", {textContent: `position ${i + 1}: `}),
      element("bdi", {textContent: this.inTip(columns.draft[at])}),
      element("div", {textContent: `certainty ${percent(this.share(columns.certainty[at]))}, entropy ${this.share(columns.entropy[at]).toFixed(3)} nats, ${state}`}),
      element("table", {}, element("tbody", {}, ...rows)));
    tip.hidden = false;
    if (this.tipOwner !== null && spans[this.tipOwner]) spans[this.tipOwner].removeAttribute("aria-describedby");
    this.tipOwner = i;
    spans[i].setAttribute("aria-describedby", "tip");
    const token = spans[i].getClientRects()[0], box = tip.getBoundingClientRect();
    if (!token) return;
    const below = token.bottom + 6, above = token.top - box.height - 6;
    tip.style.left = Math.max(8, Math.min(token.left, innerWidth - box.width - 8)) + "px";
    tip.style.top = Math.max(8, below + box.height > innerHeight && above > 0 ? above : below) + "px";
  }

  hideTip() {
    if (this.tipOwner !== null) this.spans[this.tipOwner].removeAttribute("aria-describedby");
    this.tipOwner = null;
    this.tip.hidden = true;
  }

  setRoving(i) {
    this.spans[this.roving].tabIndex = -1;
    this.roving = i;
    this.spans[i].tabIndex = 0;
  }

  play(on) {
    clearInterval(this.timer);
    this.timer = null;
    const last = this.steps ? this.steps.length - 1 : 0;
    if (on) {
      if (this.current === last) this.showStep(0);
      this.timer = setInterval(() => {
        this.showStep(this.current + 1);
        if (this.current === last) this.play(false);
      }, 1000 / Number(this.speed.value));
    }
    this.playing.textContent = on ? "❚❚ pause" : "▶ play";
    this.now.setAttribute("aria-live", on ? "off" : "polite");
  }

  go(index) {
    this.play(false);
    this.showStep(index);
  }

  chartX(index) {
    return this.steps.length < 2 ? 500 : index / (this.steps.length - 1) * 1000;
  }

  drawChart() {
    const {steps} = this;
    const top = Math.max(...steps.map((step) => step.mean_entropy), 1e-6);
    const path = (value) => steps.map((step, i) =>
      `${i && step.index === steps[i - 1].index ? "L" : "M"}${this.chartX(i)} ${98 - 96 * value(step)}h.01`).join("");
    this.mark = drawn("line", {class: "mark", id: "mark", x1: 0, x2: 0, y1: 0, y2: 100});
    const borders = steps.flatMap((step, i) => {
      if (!i || step.index === steps[i - 1].index) return [];
      const x = (this.chartX(i) + this.chartX(i - 1)) / 2;
      return [drawn("line", {class: "border", x1: x, x2: x, y1: 0, y2: 100})];
    });
    this.chart.replaceChildren(
      drawn("line", {class: "border", x1: 0, x2: 1000, y1: 99, y2: 99}),
      ...borders,
      drawn("path", {class: "share", d: path((step) => step.accepted_tokens / Math.max(1, step.free_tokens))}),
      drawn("path", {class: "entropy", d: path((step) => step.mean_entropy / top)}),
      this.mark);
    this.entropykey.textContent = `mean entropy, 0 to ${top.toFixed(3)} nats`;
  }

  drawLegend() {
    const limits = [0, ...this.run.bands, 1];
    const items = limits.slice(0, -1).map((low, i) => element("li", {
      className: "b" + i, textContent: `${i ? "" : "certainty "}${low * 100}–${limits[i + 1] * 100}%`}));
    items.push(element("li", {}, element("span", {className: "renoised", textContent: "renoised"}), ", else accepted"));
    if (this.run.canvases.some((canvas) => canvas.trial)) items.push(element("li", {}, element("span", {className: "pinned", textContent: "grey"}), " is given text"));
    this.legend.replaceChildren(...items);
  }

  tokenKey(event, i) {
    const width = this.steps[this.current].width;
    const to = {ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: width - 1}[event.key];
    if (to !== undefined) this.spans[Math.max(0, Math.min(width - 1, to))].focus();
    else if (event.key === "ArrowUp") this.go(this.current - 1);
    else if (event.key === "ArrowDown") this.go(this.current + 1);
    else return false;
    return true;
  }

  pageKey(event) {
    const to = {ArrowLeft: this.current - 1, ArrowRight: this.current + 1, Home: 0, End: this.steps.length - 1}[event.key];
    if (to !== undefined) this.go(to);
    else if (event.key === " ") this.play(this.timer === null);
    else return false;
    return true;
  }

  onKey(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const on = event.target, i = this.spans.indexOf(on);
    if (event.key === "Escape") { this.hideTip(); return; }
    if (i >= 0 && this.tokenKey(event, i)) { event.preventDefault(); return; }
    if (on.matches("select, textarea, dialog *") || (event.key === " " && on.matches("button, summary, a"))) return;
    if (on === this.slider && event.key !== " ") return; // it knows its own keys
    if (this.pageKey(event)) event.preventDefault();
  }

  listen() {
    const {signal} = this.listening, {slider, tokens} = this;
    const on = (target, kind, act, more = {}) => target.addEventListener(kind, act, {signal, ...more});
    slider.max = this.steps.length - 1;
    on(slider, "input", () => this.go(Number(slider.value)));
    on(this.previous, "click", () => this.go(this.current - 1));
    on(this.next, "click", () => this.go(this.current + 1));
    on(this.playing, "click", () => this.play(this.timer === null));
    on(this.speed, "change", () => { if (this.timer !== null) this.play(true); });
    on(this.chart, "click", (event) => {
      const box = this.chart.getBoundingClientRect();
      this.go(Math.round((event.clientX - box.left) / box.width * (this.steps.length - 1)));
    });
    on(document, "keydown", (event) => this.onKey(event));
    const replace = () => { if (this.tipOwner !== null) this.showTip(this.tipOwner); };
    on(document, "scroll", replace, {capture: true, passive: true});
    on(window, "resize", replace);
    const index = (event) => this.spans.indexOf(event.target);
    on(tokens, "mouseover", (event) => { if (index(event) >= 0) this.showTip(index(event)); });
    on(tokens, "mouseleave", () => this.hideTip());
    on(tokens, "focusin", (event) => {
      if (index(event) >= 0) { this.setRoving(index(event)); this.showTip(index(event)); }
    });
    on(tokens, "focusout", () => this.hideTip());
  }

  makeTokens() {
    const widest = Math.max(...this.steps.map((step) => step.width));
    this.spans = Array.from({length: widest}, (_, i) =>
      element("span", {className: "token", tabIndex: i ? -1 : 0, attributes: {role: "listitem"}}));
    this.tokens.replaceChildren(...this.spans);
  }
}

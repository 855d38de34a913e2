// Markdown of the model as elements. Its text never becomes markup unsanitised: raw HTML is shown as
// text, the renderer's own is sanitised, and formulas are built as elements.

import "./vendor/markdown-it/markdown-it.umd.min.js";
import "./vendor/dompurify/purify.min.js";
import {button, copied, h} from "./dom.js";
import {withMath} from "./math.js";

const {markdownit, DOMPurify} = globalThis;
const MOST_COLOURED = 60_000; // characters of a block of code
const ALLOWED = {
  ALLOWED_TAGS: ("p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s a table thead tbody tr th td span").split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start", "data-display"],
  ALLOW_DATA_ATTR: false,
  ADD_URI_SAFE_ATTR: ["start", "data-display"], // others are held against the pattern below
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const reader = markdownit({html: false, breaks: true}).disable("image").use(withMath);
const rules = reader.renderer.rules;

// Styles are refused by the page's policy; a class says the same.
for (const cell of ["th_open", "td_open"]) {
  rules[cell] = (tokens, i, options, env, self) => {
    const style = tokens[i].attrGet("style");
    tokens[i].attrs = style ? [["class", style.replace("text-align:", "align-")]] : null;
    return self.renderToken(tokens, i, options);
  };
}
// A message stands below the page's own headings.
for (const heading of ["heading_open", "heading_close"]) {
  rules[heading] = (tokens, i, options, env, self) => {
    tokens[i].tag = `h${Math.min(6, Number(tokens[i].tag[1]) + 2)}`;
    return self.renderToken(tokens, i, options);
  };
}

// Returns Markdown as elements.
export async function rendered(text) {
  const made = DOMPurify.sanitize(reader.render(text), ALLOWED);
  for (const link of made.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const table of made.querySelectorAll("table")) {
    const box = h("div", {className: "scrolled", tabIndex: 0, attributes: {role: "region", "aria-label": "Table"}});
    table.replaceWith(box);
    box.append(table);
  }
  for (const code of made.querySelectorAll("pre > code")) frame(code);
  await Promise.all([coloured(made), formulas(made)]);
  return made;
}

// Puts a line above a block of code: its language, and a button that copies it.
function frame(code) {
  const pre = code.parentElement;
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", "Code");
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const copy = button("Copy", () => copied(code.textContent, copy), {className: "quiet"});
  const box = h("div", {className: "code"}, h("p", {className: "code-head"}, h("span", {textContent: language}), copy));
  pre.replaceWith(box);
  box.append(pre);
}

async function coloured(made) {
  const blocks = [...made.querySelectorAll("pre > code[class*=language-]")].filter((code) => code.textContent.length <= MOST_COLOURED);
  if (!blocks.length) return;
  const {default: highlighter} = await import("./vendor/highlight/highlight.min.js");
  for (const code of blocks) {
    const language = /language-(\S+)/.exec(code.className)[1];
    if (!highlighter.getLanguage(language)) continue;
    const {value} = highlighter.highlight(code.textContent, {language, ignoreIllegals: true});
    code.replaceChildren(DOMPurify.sanitize(value, {...ALLOWED, ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"]}));
  }
}

// Returns JSON as coloured elements.
export async function colouredJson(text) {
  const code = h("code", {className: "language-json", textContent: text});
  const pre = h("pre", {}, code);
  await coloured(h("div", {}, pre));
  frameless(pre);
  return pre;
}

function frameless(pre) {
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", "JSON");
}

async function formulas(made) {
  const places = [...made.querySelectorAll("span.formula")];
  if (!places.length) return;
  if (!document.querySelector("link[data-katex]")) {
    document.head.append(h("link", {rel: "stylesheet", href: "/page/vendor/katex/katex.min.css", data: {katex: ""}}));
    await import("./vendor/katex/katex.min.js");
  }
  if (!globalThis.katex) await import("./vendor/katex/katex.min.js");
  for (const place of places) draw(place);
}

// Draws a formula; one that cannot be read is shown as it was written.
function draw(place) {
  const formula = place.textContent, isBlock = place.dataset.display === "block";
  if (isBlock) {
    place.tabIndex = 0; // a wide one is scrolled
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Formula");
  }
  try {
    // It builds elements and sets their styles one by one, which the page's policy allows.
    globalThis.katex.render(formula, place, {
      displayMode: isBlock,
      throwOnError: true,
      trust: false,
      strict: "ignore",
      maxSize: 20,
      maxExpand: 300,
    });
  } catch (error) {
    const sign = isBlock ? "$$" : "$";
    place.replaceWith(h("code", {textContent: sign + formula + sign, title: error.message}));
  }
}

// Splits a text that is still being written: what will not change any more as Markdown, up to the
// last blank line outside of a block of code, and the rest.
export function settledPart(text) {
  let cut = 0, open = null, at = 0;
  for (const line of text.split("\n")) {
    const fence = /^ {0,3}(`{3,}|~{3,})/.exec(line)?.[1];
    if (fence && open === null) open = fence;
    else if (fence && fence[0] === open[0] && fence.length >= open.length) open = null;
    else if (open === null && !line.trim() && at > 0) cut = at;
    at += line.length + 1;
  }
  return [text.slice(0, cut), text.slice(cut)];
}

// Formulas in Markdown: $...$, $$...$$, \(...\) and \[...\].

// The delimiters, the longer ones first.
const PAIRS = [["$$", "$$", true], ["\\[", "\\]", true], ["\\(", "\\)", false], ["$", "$", false]];

// Returns the formula that begins at a place, as {text, end, isBlock}; null if there is none.
export function formulaAt(source, start, most) {
  for (const [open, close, isBlock] of PAIRS) {
    if (!source.startsWith(open, start)) continue;
    const from = start + open.length;
    let end = source.indexOf(close, from);
    while (end > from && source[end - 1] === "\\" && close[0] === "$") end = source.indexOf(close, end + 1);
    if (end < 0 || end + close.length > most) return null;
    const text = source.slice(from, end);
    if (!text.trim() || /\n\s*\n/.test(text)) return null;
    // A price is no formula: "$5 and $6".
    if (open === "$" && (/^\s|\s$/.test(text) || /\d/.test(source[end + 1] ?? ""))) return null;
    return {text, end: end + close.length, isBlock};
  }
  return null;
}

function inline(state, silent) {
  const first = state.src[state.pos];
  if (first !== "$" && first !== "\\") return false;
  const found = formulaAt(state.src, state.pos, state.posMax);
  if (!found) return false;
  if (!silent) {
    const token = state.push("formula", "span", 0);
    token.content = found.text;
    token.meta = found.isBlock;
  }
  state.pos = found.end;
  return true;
}

// A formula on lines of its own, which may begin like a list or a heading.
function block(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  if (!/^(\$\$|\\\[)/.test(state.src.slice(start, start + 2))) return false;
  const found = formulaAt(state.src, start, state.eMarks[endLine - 1]);
  if (!found?.isBlock) return false;
  let next = startLine;
  while (next < endLine && state.eMarks[next] < found.end) next += 1;
  if (next >= endLine || state.src.slice(found.end, state.eMarks[next]).trim()) return false;
  if (silent) return true;
  state.push("paragraph_open", "p", 1);
  const token = state.push("formula", "span", 0);
  token.content = found.text;
  token.meta = true;
  state.push("paragraph_close", "p", -1);
  state.line = next + 1;
  return true;
}

// A plugin of markdown-it.
export function withMath(reader) {
  reader.inline.ruler.before("escape", "formula", inline);
  reader.block.ruler.before("fence", "formula", block, {alt: ["paragraph", "blockquote", "list"]});
  reader.renderer.rules.formula = (tokens, i) =>
    `<span class="formula" data-display="${tokens[i].meta ? "block" : "inline"}">${reader.utils.escapeHtml(tokens[i].content)}</span>`;
}

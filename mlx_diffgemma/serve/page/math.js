// Formulas in Markdown: $...$, $$...$$, \(...\) and \[...\].

// Stands for a bar within a formula while a table is split into cells: one character as well.
const BAR = "\ue000";
const RULER = /^[\s>|:-]*-[\s|:-]*$/; // the second line of a table
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

// A formula on lines of its own, which may begin like a list or a heading. Its lines are those of
// the list or quotation that it stands in, without what marks them.
function block(state, startLine, endLine, silent) {
  const start = state.bMarks[startLine] + state.tShift[startLine];
  if (!/^(\$\$|\\\[)/.test(state.src.slice(start, start + 2))) return false;
  let stop = startLine;
  while (stop < endLine && !state.isEmpty(stop) && state.sCount[stop] >= state.blkIndent) stop += 1;
  const lines = state.getLines(startLine, stop, state.blkIndent, false);
  const from = lines.length - lines.trimStart().length;
  const found = formulaAt(lines, from, lines.length);
  if (!found?.isBlock) return false;
  const rest = lines.slice(found.end);
  if (rest.split("\n", 1)[0].trim()) return false;
  if (silent) return true;
  state.push("paragraph_open", "p", 1);
  const token = state.push("formula", "span", 0);
  token.content = found.text;
  token.meta = true;
  state.push("paragraph_close", "p", -1);
  state.line = stop - (rest.split("\n").length - 1);
  return true;
}

// Returns lines of a table with the bars of formulas, as in $P(A|B)$, put out of the way.
function withoutBars(lines) {
  let made = "", from = 0;
  for (let at = lines.indexOf("$"); at >= 0; at = lines.indexOf("$", at)) {
    const end = lines.indexOf("\n", at);
    const found = formulaAt(lines, at, end < 0 ? lines.length : end);
    at = found ? found.end : at + 1;
    if (!found) continue;
    // "|$A|$B|" are two cells.
    const isHalf = /^\||\|$/.test(found.text) && found.text.split("|").length % 2 === 0;
    if (isHalf) continue;
    const start = lines.indexOf(found.text, Math.max(from, at - found.text.length - 2));
    made += lines.slice(from, start) + found.text.replaceAll("|", BAR);
    from = start + found.text.length;
  }
  return made + lines.slice(from);
}

// Lets the rule for tables leave the bars of formulas alone.
function tables(rule) {
  return (state, startLine, endLine, silent) => {
    const second = startLine + 1;
    if (second >= endLine || !RULER.test(state.src.slice(state.bMarks[second], state.eMarks[second]))) return false;
    let stop = startLine;
    while (stop < endLine && !state.isEmpty(stop)) stop += 1;
    const kept = state.src, start = state.bMarks[startLine], end = state.eMarks[stop - 1];
    state.src = kept.slice(0, start) + withoutBars(kept.slice(start, end)) + kept.slice(end);
    const isTable = rule(state, startLine, endLine, silent);
    state.src = kept;
    return isTable;
  };
}

// Puts the bars back.
function withBars({tokens}) {
  for (const {children} of tokens) {
    for (const each of children ?? []) each.content = each.content.replaceAll(BAR, "|");
  }
}

// A plugin of markdown-it.
export function withMath(reader) {
  const [table] = reader.block.ruler.getRules(""); // the first of them
  reader.block.ruler.at("table", tables(table), {alt: ["paragraph", "reference"]});
  reader.core.ruler.after("inline", "bars", withBars);
  reader.inline.ruler.before("escape", "formula", inline);
  reader.block.ruler.before("fence", "formula", block, {alt: ["paragraph", "blockquote", "list"]});
  reader.renderer.rules.formula = (tokens, i) =>
    `<span class="formula" data-display="${tokens[i].meta ? "block" : "inline"}">${reader.utils.escapeHtml(tokens[i].content)}</span>`;
}

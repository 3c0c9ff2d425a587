// An answer's text as elements: fenced code, headings, lists, bold and `code`; everything else as it was written.

import { element } from "./dom.js";

export function render(text) {
  const parts = text.split(/^```([^\n`]*)\n?/m);
  const made = [];
  // Odd entries are what stands behind a fence; the text after an opening one is code up to the next.
  for (let at = 0; at < parts.length; at += 2) {
    const isCode = (at / 2) % 2 === 1;
    if (isCode) made.push(element("pre", {}, element("code", { textContent: parts[at].replace(/\n$/, "") })));
    else made.push(...blocks(parts[at]));
  }
  return made;
}

function blocks(text) {
  return text.split(/\n{2,}/).filter((block) => block.trim()).map(block);
}

function block(text) {
  const lines = text.replace(/^\n+|\n+$/g, "").split("\n");
  const heading = /^#{1,6}\s+(.*)$/.exec(lines[0]);
  if (heading && lines.length === 1) return element("h3", {}, ...inline(heading[1]));
  if (lines.every((line) => /^\s*[-*•]\s+/.test(line))) return list("ul", lines, /^\s*[-*•]\s+/);
  if (lines.every((line) => /^\s*\d+[.)]\s+/.test(line))) {
    const made = list("ol", lines, /^\s*\d+[.)]\s+/);
    made.start = Number.parseInt(lines[0].trim(), 10);
    return made;
  }
  return element("p", {}, ...inline(lines.join("\n")));
}

function list(tag, lines, marker) {
  return element(tag, {}, ...lines.map((line) => element("li", {}, ...inline(line.replace(marker, "")))));
}

function inline(text) {
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).filter(Boolean).map((piece) => {
    if (piece.length > 2 && piece.startsWith("`") && piece.endsWith("`")) {
      return element("code", { textContent: piece.slice(1, -1) });
    }
    if (piece.length > 4 && piece.startsWith("**") && piece.endsWith("**")) {
      return element("strong", { textContent: piece.slice(2, -2) });
    }
    return piece;
  });
}

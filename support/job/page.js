"use strict";
const all = (kind, within = document) => [...within.querySelectorAll(kind)];
const tools = document.querySelector(".tools");
const examples = all("details.example");
for (const one of examples) {
  one.fields = JSON.parse(one.dataset.fields);
  one.words = one.textContent.toLowerCase();
}

function show() {
  const wanted = Object.fromEntries(new FormData(tools));
  const words = wanted.search.toLowerCase();
  let shown = 0;
  for (const one of examples) {
    const { class_name, effect } = one.fields;
    one.hidden = !one.words.includes(words)
      || (wanted.label && class_name !== wanted.label)
      || (wanted.effect && effect && effect !== wanted.effect)
      || (wanted.scores && one.dataset.scores !== wanted.scores);
    shown += !one.hidden;
  }
  for (const list of all(".list")) {
    const own = all("details.example", list);
    own.sort((one, other) => one.fields[wanted.sort] - other.fields[wanted.sort]);
    list.append(...own);
    list.hidden = own.length > 0 && own.every((one) => one.hidden);
  }
  tools.querySelector("output").textContent = `${shown} of ${examples.length}`;
}

// A spreadsheet would compute what begins like a formula.
const cell = (value) => `"${String(value ?? "").replace(/^[=+@\t\r-](?![\d.]+(e[+-]?\d+)?$)/i, "'$&").replaceAll('"', '""')}"`;

function save() {
  const shown = examples.filter((one) => !one.hidden).map((one) => ({
    scores: one.dataset.scores, query: "all", ...one.fields, text: one.querySelector("blockquote").textContent.trim(),
  }));
  const names = [...new Set(shown.flatMap(Object.keys))].filter((name) => name !== "text").concat("text");
  const lines = [names, ...shown.map((one) => names.map((name) => one[name]))];
  const file = new Blob(["\ufeff", ...lines.map((line) => line.map(cell).join(",") + "\r\n")], { type: "text/csv" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: "top.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

function open() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (named?.matches("details")) named.open = true;
  named?.scrollIntoView();
}

tools.addEventListener("input", show);
tools.addEventListener("submit", (event) => { event.preventDefault(); save(); });
addEventListener("hashchange", open);
tools.hidden = false;
show();
open();

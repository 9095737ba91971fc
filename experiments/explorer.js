"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tools = document.querySelector(".tools");
const [head, body] = document.querySelectorAll(".matrix thead, .matrix tbody");
const pair = document.querySelector(".pair");
const chosen = { training: 5, test: 4 };
const text = (side, number) => document.querySelector(`#${side}-${number} blockquote`).textContent;
const made = (kind, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(kind), properties);
  element.append(...children);
  return element;
};
const number = (score) => `${score > 0 ? "+" : "−"}${Math.abs(score).toLocaleString("en", { maximumSignificantDigits: 4 })}`;
const effect = (score) => (score > 0 ? "helps" : "harms");
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const score = (training, test, kind = tools.scores.value) => data.scores[kind][test][training];
const cells = (row) => [...row.querySelectorAll("td")];

// The page's rows and cells are made once; other scores and orders colour and move them.
for (const kind of Object.keys(data.scores)) tools.scores.append(new Option(kind));
head.append(made("tr", {}, made("th", { scope: "col", textContent: "training" }), ...data.test.map((one) => {
  const button = made("button", { type: "button", title: `Sort by test review ${one.number}` }, String(one.number), made("br"), one.label.slice(0, 3));
  button.addEventListener("click", () => { choose(chosen.training, one.number); tools.order.value = "test"; show(); });
  return made("th", { scope: "col" }, button);
})));
const rows = data.training.map((one) => {
  const row = made("tr", {}, made("th", { scope: "row", textContent: `${one.number} (${one.label.slice(0, 3)})` }));
  data.test.forEach(() => row.append(made("td", { tabIndex: -1 })));
  return Object.assign(row, { about: one, words: text("training", one.number).toLowerCase() });
});

function show() {
  const { scores, order, label, search } = Object.fromEntries(new FormData(tools));
  const largest = data.scores[scores].map((column) => Math.max(...column.map(Math.abs)));
  const size = (row) => data.test.reduce((sum, test) => sum + Math.abs(score(row.about.number, test.number)) / largest[test.number], 0);
  const by = {
    number: (row) => row.about.number, early: (row) => row.about.early, size: (row) => -size(row),
    test: (row) => -score(row.about.number, chosen.test),
  }[order];
  for (const row of rows) {
    row.hidden = (label && row.about.label !== label) || !row.words.includes(search.toLowerCase());
    cells(row).forEach((cell, test) => {
      const found = score(row.about.number, test);
      cell.className = effect(found);
      cell.style.setProperty("--w", (Math.abs(found) / largest[test]).toFixed(3));
      cell.setAttribute("aria-label", said(row.about.number, test));
    });
  }
  body.append(...rows.toSorted((one, other) => by(one) - by(other)));
  [...head.querySelectorAll("th")].slice(1).forEach((column, test) => {
    if (order === "test" && test === chosen.test) column.setAttribute("aria-sort", "descending");
    else column.removeAttribute("aria-sort");
  });
  const shown = rows.filter((row) => !row.hidden);
  tools.querySelector("output").textContent = `${shown.length} of ${rows.length} training reviews`;
  mark();
}

const said = (training, test) => `training review ${training} on test review ${test}: ${number(score(training, test))}, ${effect(score(training, test))}`;

function review(side, { number: which, label, finished, early }) {
  const sure = `True label ${label}; p(label) ${percent(finished)}, at the early snapshot ${percent(early)}.`;
  return [
    made("h3", { textContent: `${side[0].toUpperCase()}${side.slice(1)} review ${which}` }),
    made("p", { className: "about", textContent: sure }), made("blockquote", { textContent: text(side, which) }),
  ];
}

function mark() {
  for (const row of rows) {
    cells(row).forEach((cell, test) => {
      const here = row.about.number === chosen.training && test === chosen.test;
      cell.setAttribute("aria-selected", here);
      cell.tabIndex = here ? 0 : -1;
    });
  }
  // Where the chosen row is filtered away, the grid is entered by the first one that is left.
  if (rows[chosen.training].hidden) {
    const first = [...body.rows].find((row) => !row.hidden);
    if (first) cells(first)[chosen.test].tabIndex = 0;
  }
}

function choose(training, test) {
  Object.assign(chosen, { training, test });
  const values = Object.keys(data.scores).map((kind) => {
    const found = score(training, test, kind);
    const place = data.scores[kind][test].filter((one) => Math.abs(one) >= Math.abs(found)).length;
    const told = [number(found), effect(found), `rank ${place}`];
    return made("tr", {}, made("th", { scope: "row", textContent: kind }), ...told.map((textContent) => made("td", { textContent })));
  });
  pair.replaceChildren(
    made("h2", { textContent: `Training review ${training} on test review ${test}` }),
    made("table", { className: "values" }, made("tbody", {}, ...values)),
    ...review("training", data.training[training]), ...review("test", data.test[test]),
  );
  mark();
}

const place = (cell) => [cell.parentElement.about.number, cell.cellIndex - 1];
function point(event) {
  const cell = event.target.closest("td");
  if (cell) document.querySelector(".pointed").textContent = said(...place(cell));
}
body.addEventListener("mouseover", point);
body.addEventListener("focusin", point);
body.addEventListener("click", (event) => {
  const cell = event.target.closest("td");
  if (cell) choose(...place(cell));
});
body.addEventListener("keydown", (event) => {
  const cell = event.target.closest("td");
  if (!cell) return;
  const shown = [...body.rows].filter((row) => !row.hidden);
  const [down, right] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1], Home: [0, -99], End: [0, 99] }[event.key] ?? [0, 0];
  if (event.key === "Enter" || event.key === " ") choose(...place(cell));
  else if (!down && !right) return;
  else {
    const inside = (value, size) => Math.max(0, Math.min(size - 1, value));
    const row = shown[inside(shown.indexOf(cell.parentElement) + down, shown.length)];
    const next = cells(row)[inside(cell.cellIndex - 1 + right, data.test.length)];
    body.querySelectorAll("td[tabindex='0']").forEach((one) => { one.tabIndex = -1; });
    next.tabIndex = 0;
    next.focus();
  }
  event.preventDefault();
});
tools.addEventListener("input", show);
tools.addEventListener("submit", (event) => event.preventDefault());
document.querySelector(".unscripted").hidden = true;
tools.hidden = false;
document.querySelector(".both").hidden = false;
choose(chosen.training, chosen.test);
show();

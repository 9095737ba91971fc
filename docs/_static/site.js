// What scrolls sideways can be reached and scrolled with the keyboard; lists say what they are.
const SCROLLS = "pre, .cell_output, .output, .table-wrapper, mjx-container[display=true]";

function markWhatScrolls() {
  for (const element of document.querySelectorAll("article :is(" + SCROLLS + ")")) {
    const wide = element.scrollWidth > element.clientWidth;
    if (wide || element.scrollHeight > element.clientHeight) {
      element.tabIndex = 0;
    }
  }
}

document.addEventListener("DOMContentLoaded", () => {
  // Its children are bibliography entries by role, which no list may have.
  document.querySelectorAll(".citation-list").forEach((list) => list.removeAttribute("role"));
  // Parameters of a long signature are rows of <dd> with no <dt>, which no list may have either.
  document.querySelectorAll(".sig :is(dl, dd)").forEach((row) => row.setAttribute("role", "none"));
  markWhatScrolls();
});

window.addEventListener("load", () => {
  markWhatScrolls();
  window.MathJax?.startup?.promise?.then(markWhatScrolls);
});

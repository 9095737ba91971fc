/* Answers the questions of ask.html from ask-data.js: inner products of what an index keeps. */
(() => {
  const form = document.getElementById("ask");
  if (!form) return;
  const { width, questions, reviews, asked, training } = ASK;
  const [question, bytes, kind, search] = ["question", "bytes", "kind", "search"].map((n) => form.elements[n]);
  const SHOWN = 10;

  function unpacked({ numbers, scales }) {
    const raw = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return { numbers: new Int8Array(raw(numbers).buffer), scales: new Float32Array(raw(scales).buffer) };
  }
  const ours = unpacked(asked);
  const theirs = unpacked(training);

  /* An influence is the inner product of the first `kept` numbers; a relative one is divided by the review's norm. */
  function scores(row, kept, relative) {
    const own = ours.numbers.subarray(row * width, row * width + kept);
    return reviews.map((_, number) => {
      const start = number * width;
      let sum = 0;
      let square = 0;
      for (let entry = 0; entry < kept; entry++) {
        const value = theirs.numbers[start + entry];
        sum += own[entry] * value;
        square += value * value;
      }
      if (relative) return square ? (sum * ours.scales[row]) / Math.sqrt(square) : 0;
      return sum * ours.scales[row] * theirs.scales[number];
    });
  }

  function element(name, text, parent) {
    const made = document.createElement(name);
    made.textContent = text;
    if (name !== "option") made.setAttribute("role", name === "tr" ? "row" : "cell"); // phones show no table
    parent.append(made);
    return made;
  }

  function answer() {
    const row = question.selectedIndex;
    const told = questions[row];
    const start = performance.now();
    const found = scores(row, Number(bytes.value) - 4, kind.value === "relative");
    const took = performance.now() - start;
    const order = found.map((_, number) => number).sort((a, b) => Math.abs(found[b]) - Math.abs(found[a]));
    const right = order.slice(0, SHOWN).filter((number) => told[kind.value].includes(number)).length;
    document.getElementById("asked").textContent = told.text;
    const label = told.label ? ` Its label: ${told.label}.` : "";
    document.getElementById("said").textContent =
      `The model says: ${told.answer}, ${(100 * told.probability).toFixed(0)} %.${label}`;
    document.getElementById("kept").textContent =
      `${reviews.length.toLocaleString("en")} training reviews compared in ${took.toFixed(0)} ms, at ${bytes.value} bytes ` +
      `each. Of the first ${SHOWN} by the exact influences, ${right} are among the first ${SHOWN} here.`;
    const words = search.value.trim().toLowerCase();
    const holding = order.filter((number) => reviews[number].text.toLowerCase().includes(words));
    const body = document.getElementById("behind");
    body.replaceChildren();
    const places = new Map(order.map((number, place) => [number, place + 1]));
    for (const number of holding.slice(0, SHOWN)) {
      const line = element("tr", "", body);
      element("td", places.get(number), line);
      element("td", found[number] > 0 ? "for" : "against", line);
      element("td", found[number].toPrecision(3).replace("-", "−"), line);
      element("td", reviews[number].label, line);
      element("td", reviews[number].text, line);
    }
    document.getElementById("found").textContent = words
      ? `${holding.length} of the training reviews shown in part here hold “${words}”.`
      : "";
  }

  questions.forEach(({ text }) => {
    element("option", text.length > 70 ? `${text.slice(0, 70)}…` : text, question);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", answer);
  document.getElementById("without-scripts").hidden = true;
  form.hidden = false;
  document.getElementById("answer").hidden = false;
  answer();
})();

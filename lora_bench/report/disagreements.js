"use strict";

// Disagreements: the examples that one of two chosen runs predicts correctly and the other does not.
const disagreements = (() => {
  const parts = [...document.querySelectorAll(".disagreements")].map((part) => {
    const data = JSON.parse(part.querySelector("script").textContent);
    const [a, b] = [part.querySelector(".run-a"), part.querySelector(".run-b")];
    const table = part.querySelector("table");
    const said = part.querySelector(".said");
    const number = (value) => value.toLocaleString("en");

    const show = () => {
      const [i, j] = [Number(a.value), Number(b.value)];
      if (i === j) {
        said.textContent = "Choose two runs that differ.";
        table.tBodies[0].replaceChildren();
        return;
      }
      const [onlyLow, onlyHigh, neither, shown] = data.pairs[`${Math.min(i, j)},${Math.max(i, j)}`];
      const [onlyA, onlyB] = i < j ? [onlyLow, onlyHigh] : [onlyHigh, onlyLow];
      const [nameA, nameB] = [data.runs[i], data.runs[j]];
      said.textContent =
        `Of ${number(data.examples)} examples, only ${nameA} predicts ${number(onlyA)} correctly, ` +
        `only ${nameB} ${number(onlyB)}, neither ${number(neither)}.` +
        (shown.length < onlyA + onlyB ? ` The ${number(shown.length)} with the largest difference of scores are shown.` : "");
      table.tHead.rows[0].cells[2].textContent = `${data.noun} of ${nameA}`;
      table.tHead.rows[0].cells[3].textContent = `${data.noun} of ${nameB}`;
      table.tBodies[0].replaceChildren(...shown.map((n) => line(n, i, j)));
    };

    const line = (n, i, j) => {
      const [id, label] = data.rows[n];
      const right = data.runs[data.correct[i][n] ? i : j];
      const row = document.createElement("tr");
      for (const [k, content] of [id, label, data.answers[i][n], data.answers[j][n], right].entries()) {
        const cell = document.createElement(k ? "td" : "th");
        if (!k) cell.scope = "row";
        else if (k < 4) cell.className = "number";
        cell.textContent = content;
        row.append(cell);
      }
      return row;
    };
    a.addEventListener("change", show);
    b.addEventListener("change", show);
    return { data, a, b, show, said };
  });

  // Choose the runs of two settings, and return what they disagree on, or that their predictions are not here.
  const choose = (names) => {
    for (const { data, a, b, show, said } of parts) {
      const [i, j] = names.map((name) => data.settings.indexOf(name));
      if (i < 0 || j < 0) continue;
      [a.value, b.value] = [String(i), String(j)];
      show();
      return `${said.textContent} The section “Disagreements” lists them.`;
    }
    return parts.length ? "The predictions of these two settings are not on the page." : "";
  };
  return { choose };
})();

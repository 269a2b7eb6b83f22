"use strict";
document.documentElement.classList.add("scripted");

// -- light or dark --

const theme = document.getElementById("theme");
theme.addEventListener("change", () => { document.documentElement.dataset.theme = theme.value; });

// -- the leaderboard: sort by a column, filter rows --

const board = document.querySelector(".leaderboard");
if (board) {
  const heads = [...board.tHead.rows[0].cells];
  const body = board.tBodies[0];
  const first = [...body.rows];
  const names = heads.map((head) => head.dataset.name.toLowerCase());
  const raw = (row, i) => {
    const value = row.cells[i].dataset.value;
    return value === undefined ? null : Number(value);
  };

  const sort = (column, direction) => {
    const rows = [...first];
    if (direction) {
      const sign = direction === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [raw(a, column), raw(b, column)];
        if (x !== null && y !== null) return sign * (x - y);
        const [s, t] = [a.cells[column].textContent, b.cells[column].textContent];
        if (!s || !t) return (s ? 0 : 1) - (t ? 0 : 1); // what has no value comes last, either way
        return sign * s.localeCompare(t, "en", { numeric: true });
      });
    }
    heads.forEach((head, i) => {
      if (i === column && direction) head.setAttribute("aria-sort", direction);
      else head.removeAttribute("aria-sort");
    });
    body.append(...rows);
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const begin = head.classList.contains("number") ? "descending" : "ascending";
      const other = begin === "descending" ? "ascending" : "descending";
      sort(column, now === null ? begin : now === begin ? other : null);
    });
  });

  // A word must occur in the row; key=value, metric>0.5 and cost<100 ask one column.
  const test = (term) => {
    const asked = /^([^=<>]+)(=|>=|<=|>|<)(.+)$/.exec(term);
    const i = asked ? names.findIndex((name) => name === asked[1] || name.endsWith("." + asked[1])) : -1;
    if (i < 0) return (row) => row.textContent.toLowerCase().includes(term);
    const [, , sign, text] = asked;
    const number = Number(text);
    return (row) => {
      const value = raw(row, i);
      if (sign === "=") return row.cells[i].textContent.toLowerCase() === text || (value !== null && value === number);
      if (value === null) return false;
      return { ">": value > number, "<": value < number, ">=": value >= number, "<=": value <= number }[sign];
    };
  };

  const field = document.getElementById("filter");
  const count = document.querySelector(".count");
  const marks = [...document.querySelectorAll("svg [data-row]")];
  field.addEventListener("input", () => {
    const tests = field.value.toLowerCase().split(/\s+/).filter(Boolean).map(test);
    const kept = new Set();
    for (const row of first) {
      row.hidden = !tests.every((each) => each(row));
      if (!row.hidden) kept.add(row.dataset.row);
    }
    for (const mark of marks) mark.classList.toggle("dim", !kept.has(mark.dataset.row));
    const all = first.length === 1 ? "1 experiment" : `${first.length.toLocaleString("en")} experiments`;
    count.textContent = tests.length ? `${kept.size.toLocaleString("en")} of ${all}` : all;
  });

  // The row under the pointer is marked in the charts, and the point under the pointer in the table.
  const byRow = new Map();
  for (const mark of [...marks, ...first]) {
    if (!byRow.has(mark.dataset.row)) byRow.set(mark.dataset.row, []);
    byRow.get(mark.dataset.row).push(mark);
  }
  let hot = [];
  document.addEventListener("pointerover", (event) => {
    const under = event.target.closest("[data-row]");
    for (const mark of hot) mark.classList.remove("hot");
    hot = under ? byRow.get(under.dataset.row) : [];
    for (const mark of hot) mark.classList.add("hot");
  });
}

// -- what a point stands for, beside the pointer: the title elements, shown at once --

const tip = document.getElementById("tip");
const titles = new WeakMap();
document.addEventListener("pointerover", (event) => {
  const shape = event.target.closest("svg *");
  const title = shape && shape.querySelector(":scope > title");
  if (title) {
    titles.set(shape, title.textContent);
    title.remove(); // or the browser would show it a second time, a second later
  }
  tip.hidden = !(shape && titles.has(shape));
  if (!tip.hidden) {
    tip.textContent = titles.get(shape);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY + box.height + 24 < innerHeight ? event.clientY + 16 : event.clientY - box.height - 12}px`;
  }
});

// -- disagreements of two runs --

for (const part of document.querySelectorAll(".disagreements")) {
  const data = JSON.parse(part.querySelector("script").textContent);
  const [a, b] = [part.querySelector(".run-a"), part.querySelector(".run-b")];
  const table = part.querySelector("table");
  const said = part.querySelector(".said");
  const number = (value) => value.toLocaleString("en");

  const show = () => {
    const [i, j] = [Number(a.value), Number(b.value)];
    const rows = [];
    if (i === j) {
      said.textContent = "Choose two runs that differ.";
    } else {
      const [low, high] = [Math.min(i, j), Math.max(i, j)];
      const [onlyLow, onlyHigh, neither, shown] = data.pairs[`${low},${high}`];
      const [onlyA, onlyB] = i === low ? [onlyLow, onlyHigh] : [onlyHigh, onlyLow];
      const [nameA, nameB] = [data.runs[i], data.runs[j]];
      const more = shown.length < onlyA + onlyB;
      said.textContent =
        `Of ${number(data.examples)} examples, only ${nameA} predicts ${number(onlyA)} correctly, ` +
        `only ${nameB} ${number(onlyB)}, neither ${number(neither)}.` +
        (more ? ` The ${number(shown.length)} with the largest difference of scores are shown.` : "");
      table.tHead.rows[0].cells[2].textContent = `score of ${nameA}`;
      table.tHead.rows[0].cells[3].textContent = `score of ${nameB}`;
      for (const n of shown) {
        const [id, label] = data.rows[n];
        const [x, y] = [data.scores[i][n], data.scores[j][n]];
        const right = (x >= data.threshold) === (label === 1) ? nameA : nameB;
        const row = document.createElement("tr");
        for (const [k, text] of [id, label, x.toFixed(4), y.toFixed(4), right].entries()) {
          const cell = document.createElement(k ? "td" : "th");
          if (!k) cell.scope = "row";
          cell.textContent = text;
          row.append(cell);
        }
        rows.push(row);
      }
    }
    table.tBodies[0].replaceChildren(...rows);
  };
  a.addEventListener("change", show);
  b.addEventListener("change", show);
}

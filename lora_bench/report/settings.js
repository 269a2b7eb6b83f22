"use strict";

// All settings: sort by a column, filter rows, tick rows and compare them.
const settings = (() => {
  const root = document.querySelector(".settings");
  if (!root) return { data: null };
  const read = (name) => JSON.parse(root.querySelector(`script.${name}`).textContent);
  const data = read("data");
  const table = root.querySelector(".board");
  const heads = [...table.tHead.rows[0].cells].slice(1);
  const body = table.tBodies[0];
  const first = [...body.rows];
  const names = heads.map((head) => head.dataset.name.toLowerCase());
  const numberOf = new Map(data.columns.map((column, i) => [column.name, i]));

  const text = (row, i) => row.cells[i + 1].textContent;
  const raw = (row, i) => {
    const column = numberOf.get(heads[i].dataset.name);
    if (column !== undefined) return data.rows[row.dataset.row].values[column];
    const value = text(row, i);
    return value === "" || Number.isNaN(Number(value)) ? null : Number(value);
  };

  // -- sort --

  const sort = (column, direction) => {
    const rows = [...first];
    if (direction) {
      const sign = direction === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [raw(a, column), raw(b, column)];
        if (x !== null && y !== null) return sign * (x - y);
        const [s, t] = [text(a, column), text(b, column)];
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

  // -- filter: a word must occur in the row; key=value, metric>0.5 and cost<100 are about one column --

  const test = (term) => {
    const parsed = /^([^=<>]+)(=|>=|<=|>|<)(.+)$/.exec(term);
    const i = parsed ? names.findIndex((name) => name === parsed[1] || name.endsWith("." + parsed[1])) : -1;
    if (i < 0) return (row) => row.textContent.toLowerCase().includes(term);
    const [, , sign, wanted] = parsed;
    const number = Number(wanted);
    return (row) => {
      const value = raw(row, i);
      if (sign === "=") return text(row, i).toLowerCase() === wanted || (value !== null && value === number);
      if (value === null) return false;
      return { ">": value > number, "<": value < number, ">=": value >= number, "<=": value <= number }[sign];
    };
  };
  const field = root.querySelector("#filter");
  const count = root.querySelector(".count");
  const filter = () => {
    const tests = field.value.toLowerCase().split(/\s+/).filter(Boolean).map(test);
    for (const row of first) row.hidden = !tests.every((matches) => matches(row));
    const all = first.length === 1 ? "1 setting" : `${first.length.toLocaleString("en")} settings`;
    const kept = first.filter((row) => !row.hidden).length;
    count.textContent = tests.length ? `${kept.toLocaleString("en")} of ${all}` : all;
  };
  field.addEventListener("input", filter);
  filter();

  // -- tick and compare --

  const ticked = []; // numbers of rows, in the order of ticking
  const panel = root.querySelector(".ticked");
  const metric = root.querySelector(".metric");
  const box = (row) => row.cells[0].firstElementChild;
  const number = (value) => (value === null ? "" : (+value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−"));

  const drawIntervals = (rows) => {
    const column = Number(metric.value);
    const spec = read("intervals-spec");
    const { title } = data.columns[column];
    const drawn = rows.filter((row) => row.values[column] !== null);
    spec.data.values = drawn.map((row) => ({
      label: row.label, value: row.values[column], low: row.low[column], high: row.high[column], recommended: row.recommended,
      tip: `${row.name}\n${title} ${number(row.values[column])}`,
    }));
    spec.height = data.lane_height * drawn.length;
    for (const layer of spec.layer) {
      if (layer.encoding.y) layer.encoding.y.scale.domain = drawn.map((row) => row.label);
      layer.encoding.x.axis.title = title;
    }
    root.querySelector(".metric-title").textContent = title;
    charts.render(root.querySelector(".intervals"), spec);
  };

  const drawCurves = (rows) => {
    const drawn = rows.filter((row) => row.curve).slice(0, 8);
    root.querySelector(".of-curves").hidden = !drawn.length;
    if (!drawn.length) return;
    const spec = read("curves-spec");
    spec.data.values = drawn.flatMap((row) => row.curve.map(([step, value]) => (
      { series: row.legend, step, value, tip: `${row.name}\nstep ${step}: ${number(value)}` })));
    spec.usermeta = { longest: Math.max(...drawn.flatMap((row) => row.legend.split("\n")).map((line) => line.length)) };
    const scale = { domain: drawn.map((row) => row.legend), range: drawn.map((_, i) => `var(--s${i})`) };
    for (const layer of spec.layer) layer.encoding.color.scale = scale;
    charts.render(root.querySelector(".lines"), spec);
  };

  const cell = (tag, content, isNumber) => {
    const element = document.createElement(tag);
    element.textContent = content;
    if (tag === "th") element.scope = isNumber === null ? "row" : "col";
    if (isNumber) element.className = "number";
    return element;
  };
  const listNumbers = (rows) => {
    const numbers = root.querySelector(".numbers");
    const head = document.createElement("tr");
    head.append(cell("th", "setting", false), ...data.columns.map((column) => cell("th", column.title, true)));
    numbers.tHead.replaceChildren(head);
    numbers.tBodies[0].replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      line.append(cell("th", row.name, null), ...row.values.map((value) => cell("td", number(value), true)));
      return line;
    }));
  };

  const compare = () => {
    const rows = ticked.map((i) => data.rows[i]);
    panel.hidden = rows.length < 2;
    root.querySelector(".hint").hidden = !panel.hidden;
    if (panel.hidden) return;
    drawIntervals(rows);
    drawCurves(rows);
    listNumbers(rows);
    root.querySelector(".pair").textContent = disagreements.choose(rows.slice(-2).map((row) => row.name));
  };
  const tick = (i, on) => {
    const at = ticked.indexOf(i);
    if (on && at < 0) ticked.push(i);
    if (!on && at >= 0) ticked.splice(at, 1);
    box(first[i]).checked = on;
  };
  body.addEventListener("change", (event) => {
    tick(Number(event.target.closest("tr").dataset.row), event.target.checked);
    compare();
  });
  root.querySelector(".clear").addEventListener("click", () => {
    [...ticked].forEach((i) => tick(i, false));
    compare();
  });
  metric.addEventListener("change", compare);

  // What the page keeps while it is refreshed.
  const state = () => ({ filter: field.value, ticked: ticked.map((i) => data.rows[i].name), metric: metric.value });
  const restore = (old) => {
    field.value = old.filter;
    filter();
    if ([...metric.options].some((option) => option.value === old.metric)) metric.value = old.metric;
    data.rows.forEach((row, i) => { if (old.ticked.includes(row.name)) tick(i, true); });
  };
  return { data, compare, state, restore };
})();

"use strict";

// Quality against cost: the chart for the axes that are chosen.
for (const part of document.querySelectorAll(".tradeoffs")) {
  const [x, y] = [part.querySelector("select.x"), part.querySelector("select.y")];
  const lower = JSON.parse(part.querySelector("script.lower").textContent);
  const figure = part.querySelector("figure");
  const number = (value) => (+value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 }).replace("-", "−");

  // The points that no other one beats in one without losing in the other, the cheapest first.
  const front = (points, sign) => {
    const kept = [];
    for (const point of [...points].sort((a, b) => a.x - b.x || sign * (b.y - a.y))) {
      if (!kept.length || sign * point.y > sign * kept.at(-1).y) kept.push(point);
    }
    return kept;
  };

  const show = () => {
    const { columns, rows } = settings.data;
    const [i, j] = [x, y].map((select) => columns.findIndex((column) => column.name === select.value));
    const [across, up] = [columns[i].title, columns[j].title];
    const points = rows
      .filter((row) => row.block === Number(part.dataset.block) && row.values[i] !== null && row.values[j] !== null)
      .map((row) => ({
        x: row.values[i], y: row.values[j], series: row.series, name: row.name,
        tip: `${row.name}\n${up} ${number(row.values[j])}\n${across}: ${number(row.values[i])}`,
      }));
    const best = front(points, lower.includes(y.value) ? -1 : 1);
    for (const point of points) point.front = best.includes(point);
    const [least, most] = [Math.min(...points.map((p) => p.x)), Math.max(...points.map((p) => p.x))];
    const scale = least > 0 && most / least > 5 ? { type: "log", nice: false, padding: 10 } : { zero: false, nice: true, padding: 10 };
    const spec = charts.specOf(figure);
    spec.data.values = points;
    for (const { encoding } of spec.layer) {
      encoding.x.scale = scale;
      encoding.x.axis.title = across;
      encoding.y.axis.title = up;
    }
    const title = `${up} against ${across}`;
    figure.querySelector("figcaption strong").textContent = title;
    const chart = figure.querySelector(".chart");
    chart.setAttribute("aria-label", `Chart: ${title}. ${points.length} settings; on the front: ${best.map((p) => p.name).join(", ")}.`);
    charts.render(chart, spec);
    list(best, across, up);
  };

  const list = (best, across, up) => {
    const table = figure.querySelector("table.front");
    table.caption.textContent = `The front: ${up} against ${across}`;
    const heads = table.tHead.rows[0].cells;
    heads[1].textContent = up;
    heads[2].textContent = across;
    table.tBodies[0].replaceChildren(...best.map((point) => {
      const row = document.createElement("tr");
      for (const [k, content] of [point.name, number(point.y), number(point.x)].entries()) {
        const cell = document.createElement(k ? "td" : "th");
        if (k) cell.className = "number";
        else cell.scope = "row";
        cell.textContent = content;
        row.append(cell);
      }
      return row;
    }));
  };
  x.addEventListener("change", show);
  y.addEventListener("change", show);
}

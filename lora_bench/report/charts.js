"use strict";
document.documentElement.classList.add("scripted");

// Draws Vega-Lite specifications. Expressions are interpreted, so that no text is ever run as code, and nothing is loaded.
const charts = (() => {
  const font = '-apple-system, "Segoe UI", Roboto, Inter, "Helvetica Neue", Arial, sans-serif';
  const config = {
    aria: false,
    background: "transparent",
    font,
    lineBreak: "\n",
    view: { stroke: "transparent" },
    axis: {
      labelColor: "var(--ink)", titleColor: "var(--soft)", gridColor: "var(--rule)", domainColor: "var(--rule)",
      tickColor: "var(--rule)", labelFontSize: 12.5, titleFontSize: 12.5, titleFontWeight: 600, labelLimit: 0, titleLimit: 0,
      labelPadding: 6, titlePadding: 8, labelLineHeight: 15,
    },
    legend: {
      orient: "top", direction: "vertical", labelLimit: 0, titleLimit: 0, labelColor: "var(--ink)", labelFontSize: 12.5,
      symbolSize: 90, symbolOpacity: 1, rowPadding: 4, columnPadding: 18, offset: 12,
    },
  };
  const refuse = () => Promise.reject(new Error("this page loads nothing"));

  const render = async (box, spec) => {
    if (box.view) box.view.finalize();
    const canvas = document.createElement("div"); // Vega describes its container, and the description of the box stays
    canvas.setAttribute("aria-hidden", "true");
    box.replaceChildren(canvas);
    const longest = spec.usermeta ? spec.usermeta.longest : 1;
    const columns = Math.max(1, Math.floor((box.clientWidth - 40) / (7.2 * longest + 40)));
    const legend = { ...config.legend, columns };
    const compiled = vegaLite.compile(spec, { config: { ...config, legend } }).spec;
    box.view = new vega.View(vega.parse(compiled, null, { ast: true }), {
      expr: vegaInterpreter.expressionInterpreter,
      renderer: "svg",
      container: canvas,
      loader: { load: refuse, sanitize: refuse, http: refuse, file: refuse },
      logLevel: vega.Error,
    });
    box.view.tooltip(showTip);
    await box.view.runAsync();
    box.dataset.drawn = "true";
  };

  // What a mark stands for, beside the pointer.
  const tip = document.getElementById("tip");
  const showTip = (handler, event, item, value) => {
    tip.hidden = value === null || value === undefined || value === "";
    if (tip.hidden) return;
    tip.textContent = String(value);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    const below = event.clientY + box.height + 24 < innerHeight;
    tip.style.top = `${below ? event.clientY + 16 : event.clientY - box.height - 12}px`;
  };

  const specOf = (figure) => JSON.parse(figure.querySelector(":scope > script.spec").textContent);

  // A chart is drawn once it is seen: those of folded sections when they are opened.
  const drawVisible = () => {
    for (const figure of document.querySelectorAll("figure:has(> script.spec)")) {
      const box = figure.querySelector(".chart");
      if (box.view || !box.clientWidth) continue;
      render(box, specOf(figure));
    }
  };
  document.addEventListener("toggle", drawVisible, true);
  return { render, specOf, drawVisible };
})();

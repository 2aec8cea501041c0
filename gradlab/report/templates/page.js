"use strict";
(() => {
  const views = new Map();

  // Charts: drawn when they come near the screen, or all before printing.
  const draw = (place) => {
    if (views.has(place.id)) return views.get(place.id);
    const source = document.querySelector(`script[data-chart="${place.id}"]`);
    const options = { actions: false, renderer: place.dataset.renderer, ast: true, hover: false };
    const drawn = window.vegaEmbed(place, JSON.parse(source.textContent), options).then((result) => {
      place.dataset.drawn = "yes";
      return result.view;
    });
    views.set(place.id, drawn);
    return drawn;
  };
  const set = (id, signal, value) => draw(document.getElementById(id)).then((view) => view.signal(signal, value).runAsync());
  const charts = document.querySelectorAll(".chart");
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  charts.forEach((place) => watcher.observe(place));
  window.addEventListener("beforeprint", () => charts.forEach(draw));

  // Sliders over recorded steps.
  document.querySelectorAll("input[data-charts]").forEach((slider) => {
    const texts = JSON.parse(slider.dataset.texts);
    const said = document.getElementById(slider.dataset.said);
    const show = () => {
      const k = Number(slider.value);
      said.textContent = texts[k];
      slider.setAttribute("aria-valuetext", texts[k]);
      slider.dataset.charts.split(" ").forEach((id) => set(id, "k", k));
    };
    slider.addEventListener("input", show);
    if (Number(slider.value) !== texts.length - 1) show(); // a browser keeps the slider's place when a page is reloaded
  });

  // Curves that are switched on and off.
  document.querySelectorAll(".switches").forEach((group) => {
    const boxes = [...group.querySelectorAll("input")];
    const show = () => set(group.dataset.chart, "hidden", boxes.filter((box) => !box.checked).map((box) => Number(box.value)));
    boxes.forEach((box) => box.addEventListener("change", show));
    if (boxes.some((box) => !box.checked)) show();
  });

  // Tables that a click on a heading sorts; numbers by size, what has none last.
  const order = (cell) => cell.dataset.number !== undefined
    ? (cell.dataset.number === "" ? NaN : Number(cell.dataset.number.replace("inf", "Infinity"))) : cell.textContent.trim();
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [order(row.cells[column]), row]);
      rows.sort(([a], [b]) => {
        if (typeof a === "string") return (down ? -1 : 1) * a.localeCompare(b, "en", { numeric: true });
        if (Number.isNaN(a) || Number.isNaN(b)) return Number(Number.isNaN(a)) - Number(Number.isNaN(b));
        return a === b ? 0 : (down ? b > a : a > b) ? 1 : -1;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  });
})();

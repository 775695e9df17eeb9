"use strict";
// Answers to pointing and to keys. Everything is drawn already; text goes in as text, never as HTML.
(function () {
  const byId = (id) => document.getElementById(id);
  const chart = byId("timeline"), steps = JSON.parse(byId("steps").textContent);
  const plot = chart.querySelector(".plot"), cursor = plot.querySelector(".cursor");
  const bars = document.querySelectorAll("#readout .bar i"), legend = document.querySelectorAll("#readout .legend b");
  const owners = byId("owners").tBodies[0].rows;
  const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const bytes = (count) => count >= 1e5 ? number(count / 1e6, 2) + " MB" : count ? number(count / 1e3, 1) + " kB" : "0";
  const last = steps.rows.length - 1;
  let at = steps.peak;

  function show(index) {
    at = Math.max(0, Math.min(last, index));
    const [operation, phase, layer, name, parts, held] = steps.rows[at];
    const total = parts.reduce((sum, part) => sum + part, 0);
    const where = "operation " + number(operation + 1, 0) + " of " + number(steps.count, 0) + ", " + steps.names[phase] +
      (at === steps.peak ? ": the peak" : "");
    cursor.style.left = 100 * (at + 0.5) / (last + 1) + "%";
    byId("total").textContent = bytes(total);
    byId("place").textContent = where;
    byId("layer").textContent = steps.names[layer];
    byId("name").textContent = steps.names[name];
    parts.forEach((part, role) => {
      bars[role].style.flexGrow = part;
      legend[role].textContent = bytes(part);
    });
    for (let i = 0; i < owners.length; i++) {
      owners[i].hidden = i >= held.length;
      if (i < held.length) {
        const [owner, role, count] = held[i], cells = owners[i].cells;
        cells[0].firstElementChild.textContent = steps.names[owner];
        cells[1].textContent = steps.roles[role];
        cells[2].textContent = bytes(count);
      }
    }
    chart.setAttribute("aria-valuenow", at + 1);
    chart.setAttribute("aria-valuetext", where + ", " + steps.names[layer] + ", " + bytes(total));
  }

  function point(event) {
    const box = plot.getBoundingClientRect();
    show(Math.floor((event.clientX - box.left) / box.width * (last + 1)));
  }
  plot.addEventListener("pointermove", point);  // a finger too: sideways, since the page scrolls up and down
  plot.addEventListener("pointerdown", point);
  const leaps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -20, PageUp: 20 };
  chart.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const places = { Home: 0, End: last, p: steps.peak, P: steps.peak };
    if (event.key in places) show(places[event.key]);
    else if (event.key in leaps) show(at + leaps[event.key]);
    else return;
    event.preventDefault();
  });

  // the picture from zero, or from what is there before the step: the peak stays where it is
  const drawing = plot.querySelector("svg"), zoom = byId("zoom");
  function draw() {
    chart.classList.toggle("zoomed", zoom.checked);
    drawing.setAttribute("viewBox", drawing.getAttribute(zoom.checked ? "data-part" : "data-whole"));
  }
  zoom.addEventListener("change", draw);
  draw();  // a browser may remember what was ticked

  const matrix = byId("confusion"), said = byId("cell");
  function tell(event) {
    const cell = event.target.closest("tbody td");
    if (!cell || cell.className === "sum") return;
    const row = cell.parentElement, heads = matrix.tHead.rows[0].cells;
    const total = row.cells[row.cells.length - 1].textContent.split(" of ")[1];
    said.textContent = "“" + row.cells[0].textContent + "” answered “" + heads[cell.cellIndex].textContent + "”: " +
      (cell.textContent || "0") + " of " + total;
  }
  matrix.addEventListener("pointerover", tell);
  matrix.addEventListener("click", tell);
})();

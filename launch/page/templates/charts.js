"use strict";
// Draws each chart of the page from the JSON beside it, in the colours of the reader's light or dark system, and again
// when that changes, when a name in its legend is pressed, and in light colours on paper. Of charts that are shown one at a
// time each is drawn when it is chosen.
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const config = {displayModeBar: false, responsive: true, showTips: false};
let printing = false;

function painted(value, palette) {
  if (typeof value === "string") {
    return value.startsWith("var(--") ? palette[value.slice(6, -1)] : value;
  }
  if (Array.isArray(value)) {
    return typeof value[value.length - 1] === "number" ? value : value.map((part) => painted(part, palette));
  }
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, painted(part, palette)]));
}

function draw(plot) {
  const described = JSON.parse(document.getElementById(plot.id + "-data").textContent);
  const figure = painted(described, dark.matches && !printing ? PALETTES.dark : PALETTES.light);
  const pressed = plot.closest("figure").querySelectorAll(".legend button");
  for (const trace of figure.data) {
    const button = pressed[trace.legendgroup];
    trace.visible = !button || button.getAttribute("aria-pressed") === "true";
  }
  if (touch) figure.layout.dragmode = false;  // a finger scrolls the page
  return Plotly.react(plot, figure.data, figure.layout, config);
}

function choose(group, place) {
  [...group.children].forEach((figure, i) => { figure.hidden = i !== place; });
  draw(group.children[place].querySelector(".plot"));
  group.children[place].querySelectorAll(".choice button")[place].focus();
}

const wide = new ResizeObserver((boxes) => boxes.forEach(({target}) => {
  target.classList.toggle("wide", target.scrollWidth > target.clientWidth);
}));
document.querySelectorAll(".scroll").forEach((box) => wide.observe(box));
const plots = [...document.querySelectorAll(".plot")].filter((plot) => !plot.closest("figure").hidden);
const drawAll = () => document.querySelectorAll("figure:not([hidden]) .plot").forEach(draw);
dark.addEventListener("change", drawAll);
addEventListener("beforeprint", () => { printing = true; drawAll(); });
addEventListener("afterprint", () => { printing = false; drawAll(); });
document.addEventListener("click", (event) => {
  const choice = event.target.closest(".choice button");
  if (choice) choose(choice.closest(".switch"), [...choice.parentElement.children].indexOf(choice));
  const button = event.target.closest(".legend button");
  if (!button) return;
  button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
  draw(button.closest("figure").querySelector(".plot"));
});
(async () => {
  for (const plot of plots) {
    await draw(plot);
    await new Promise((done) => setTimeout(done));  // the page stays usable meanwhile
  }
  document.documentElement.dataset.drawn = plots.length;
})();

"use strict";
for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const data = JSON.parse(figure.dataset.hover);
  const plot = figure.querySelector(".plot"), tip = figure.querySelector(".tip"), cursor = figure.querySelector(".cursor");
  const show = (value) => Number.isInteger(value) ? value.toLocaleString("en") : String(value);

  function nearest(steps, at) {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < at) low = middle; else high = middle;
    }
    return Math.abs(steps[low] - at) <= Math.abs(steps[high] - at) ? low : high;
  }

  function move(event) {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const at = data.x[0] + share * (data.x[1] - data.x[0]);
    const main = data.series.reduce((most, one) => one.steps.length > most.steps.length ? one : most);
    const step = main.steps[nearest(main.steps, at)];
    tip.textContent = "step " + step.toLocaleString("en");
    for (const one of data.series) {
      const index = nearest(one.steps, step), row = document.createElement("div");
      row.textContent = one.name + " " + show(one.values[index]);
      if (one.steps[index] !== step && !one.name.endsWith("smoothed")) row.textContent += " (step " + one.steps[index].toLocaleString("en") + ")";
      tip.append(row);
    }
    const left = (step - data.x[0]) / (data.x[1] - data.x[0]) * box.width;
    tip.hidden = cursor.hidden = false;
    cursor.style.left = left + "px";
    tip.style.left = (left + tip.offsetWidth + 14 > box.width ? Math.max(-40, left - tip.offsetWidth - 10) : left + 10) + "px";
  }

  plot.addEventListener("pointermove", move);
  plot.addEventListener("pointerdown", move);
  plot.addEventListener("pointerleave", () => { tip.hidden = cursor.hidden = true; });
}

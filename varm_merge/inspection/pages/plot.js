// A line for each target over the blocks, on a logarithmic scale; colour, dashes and marks all tell the lines apart.

const DASHES = ["", "8 4", "2 4", "10 3 2 3", "5 2", "1 5"];
const MARKS = [  // within a radius of 4
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "M-3.5-3.5h7v7h-7Z", "M0-4.5L4.5 3.5h-9Z", "M0-5L5 0L0 5L-5 0Z",
  "M-4-4L4 4M4-4L-4 4", "M0-5V5M-5 0H5",
];

function drawn(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

const lineStyle = (index) => ({
  stroke: `var(--line-${(index % 6) + 1})`, "stroke-dasharray": DASHES[(index + Math.floor(index / 6)) % 6],
});
const mark = (index, x, y) => drawn("path", {
  d: MARKS[index % 6], transform: `translate(${x} ${y})`, stroke: `var(--line-${(index % 6) + 1})`,
  fill: index % 6 < 4 ? `var(--line-${(index % 6) + 1})` : "none", "stroke-width": 2, class: "mark",
});

/** Ticks of a logarithmic axis around the values: powers of ten, and 2 and 5 of each where there are few. */
function logTicks(values) {
  const [least, greatest] = [Math.min(...values), Math.max(...values)];
  const decades = Math.log10(greatest / least);
  const factors = decades < 3 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / 8));
  const ticks = [];
  for (let power = Math.floor(Math.log10(least)) - every; power <= Math.ceil(Math.log10(greatest)) + every; power += 1) {
    if (power % every === 0) ticks.push(...factors.map((factor) => Number(`${factor}e${power}`)));
  }
  const [first, last] = [ticks.findLastIndex((tick) => tick < least), ticks.findIndex((tick) => tick > greatest)];
  return ticks.slice(first, last + 1);
}

/** Draw the plot and keep it as wide as its place; the slider and the pointer choose the block that is read out. */
function startPlot(place, blocks, targets) {
  const slider = document.getElementById("block");
  const readout = document.getElementById("depth-readout");
  const values = blocks.flatMap((block) => block.means).filter((mean) => mean > 0);
  if (!values.length) {
    document.getElementById("depth").textContent = "No target moved any block.";
    return;
  }
  const ticks = logTicks(values);
  const [least, greatest] = [ticks[0], ticks.at(-1)];
  const left = 52;
  let step = 1;
  const x = (index) => left + step * (index + 0.5);

  function draw() {
    const [width, height] = [place.clientWidth, place.clientWidth < 500 ? 220 : 300];
    const bottom = height - 40;
    const y = (value) => 8 + (bottom - 8) * (1 - Math.log(value / least) / Math.log(greatest / least));
    step = (width - left - 8) / blocks.length;
    const svg = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Mean squared delta by block; the table below has its numbers" });
    for (const tick of ticks) {
      svg.append(drawn("line", { x1: left, x2: width, y1: y(tick), y2: y(tick), class: "grid" }));
      svg.append(drawn("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toExponential()));
    }
    const labelEvery = Math.ceil(28 / step);
    blocks.forEach(({ stack, number }, index) => {
      if (number % labelEvery === 0) svg.append(drawn("text", { x: x(index), y: bottom + 16, "text-anchor": "middle" }, number));
      if (!index || blocks[index - 1].stack !== stack) {
        if (index) svg.append(drawn("line", { x1: x(index - 0.5), x2: x(index - 0.5), y1: 8, y2: bottom, class: "border" }));
        svg.append(drawn("text", { x: left + step * index, y: bottom + 33, class: "stack" }, stack));
      }
    });
    svg.append(drawn("line", { id: "rule", y1: 8, y2: bottom, class: "rule" }));
    targets.forEach((_, target) => drawLine(svg, target, y));
    place.replaceChildren(svg);
    slider.style.marginLeft = `${x(0) - 8}px`;  // its thumb, 16 wide, stands under the block
    slider.style.width = `${x(blocks.length - 1) - x(0) + 16}px`;
    readOutBlock();
  }

  function drawLine(svg, target, y) {
    let path = "";
    const marks = [];
    blocks.forEach((block, index) => {
      const mean = block.means[target];
      const goesOn = index > 0 && blocks[index - 1].stack === block.stack && blocks[index - 1].means[target] > 0;
      if (!(mean > 0)) return;
      path += `${goesOn ? "L" : "M"}${x(index).toFixed(1)} ${y(mean).toFixed(1)}`;
      if (index % Math.ceil(14 / step) === 0 || !goesOn) marks.push(mark(target, x(index), y(mean)));
    });
    svg.append(drawn("path", { d: path, fill: "none", "stroke-width": 2, ...lineStyle(target) }), ...marks);
  }

  function readOutBlock() {
    const block = blocks[slider.value];
    const told = block.means.map((mean, target) => `${targets[target]} ${mean === null ? "–" : brief(mean)}`);
    readout.replaceChildren(made("b", "name", `${block.stack}.${block.number}`), ` · ${told.join(" · ")}`);
    slider.setAttribute("aria-valuetext", readout.textContent);
    const rule = place.querySelector("#rule");
    rule.setAttribute("x1", x(Number(slider.value)));
    rule.setAttribute("x2", x(Number(slider.value)));
  }

  place.addEventListener("pointermove", (event) => {
    const index = Math.floor((event.clientX - place.getBoundingClientRect().left - left) / step);
    slider.value = Math.min(Math.max(index, 0), blocks.length - 1);
    readOutBlock();
  });
  slider.addEventListener("input", readOutBlock);
  document.getElementById("depth-legend").append(...targets.map((name, index) => {
    const item = made("li");
    const sample = drawn("svg", { width: 40, height: 14, "aria-hidden": "true" });
    sample.append(drawn("line", { x1: 0, x2: 40, y1: 7, y2: 7, "stroke-width": 2, ...lineStyle(index) }), mark(index, 20, 7));
    item.append(sample, ` ${name}`);
    return item;
  }));
  draw();
  let width = place.clientWidth;
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    draw();
  })).observe(place);
}

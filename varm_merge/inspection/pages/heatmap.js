// Heat maps of weights, parts of a block by blocks, as grids to walk through with the arrow keys.

const [NAME, ROW, COLUMN, ELEMENTS, TENSORS, MOVED, NUMBERS] = [0, 1, 2, 3, 4, 5, 6];  // of a unit
const MANY_COLUMNS = 12;  // more have no room for numbers in their cells

/** An element with a class, text and attributes. */
function made(tag, className = "", text = "", attributes = {}) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== "") element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

/** The header of a row, whose name may be broken after points and underscores. */
function rowHead(className, name) {
  const head = made("th", className, "", { scope: "row" });
  head.append(...name.split(/(?<=[._/])/).flatMap((part) => [part, made("wbr")]));
  return head;
}

/** A number in three digits, as the tables have them. */
function brief(value) {
  return value !== 0 && Math.abs(value) < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}

/** A unit's even share: of a tensor that only some targets have, theirs. */
function evenShare(unit) {
  return 1 / unit[NUMBERS].filter((of) => of !== null).length;
}

/** The map of one target: a caption over a table that scrolls in a box of its own. */
function heatMap(granularity, target) {
  const units = data.units[granularity];
  const columns = [...new Set(units.map((unit) => unit[COLUMN]))].filter((column) => column >= 0).sort((a, b) => a - b);
  const rows = Map.groupBy(units, (unit) => unit[ROW]);
  const dense = columns.length > MANY_COLUMNS;
  const figure = made("figure", dense ? "map dense" : "map");
  const name = data.targets[target];
  figure.append(made("figcaption", "", name));
  const box = made("div", "box");
  const table = made("table", "", "", {
    role: "grid", "aria-readonly": "true", "aria-label": `Weights of ${name} at granularity ${data.labels[granularity]}`,
  });
  table.style.setProperty("--columns", Math.max(columns.length, 1));
  if (columns.length) table.append(mapHead(columns));
  const body = table.createTBody();
  for (const row of [...rows.keys()].sort((a, b) => a - b)) {
    const line = body.insertRow();
    line.append(rowHead("", data.rows[row]));
    const ofRow = new Map(rows.get(row).map((unit) => [unit[COLUMN], unit]));
    if (ofRow.has(-1)) {
      const cell = mapCell(ofRow.get(-1), target);
      cell.colSpan = Math.max(columns.length, 1);
      line.append(cell);
    } else {
      line.append(...columns.map((column) => (ofRow.has(column) ? mapCell(ofRow.get(column), target) : made("td"))));
    }
  }
  body.querySelector("td[tabindex]").tabIndex = 0;
  box.append(table);
  figure.append(box);
  return figure;
}

/** The stacks of blocks, and under each the blocks' numbers, as many as there is room for. */
function mapHead(columns) {
  const head = made("thead");
  const stacks = head.insertRow();
  const numbers = head.insertRow();
  stacks.append(made("td", "", "", { rowspan: "2" }));
  const step = columns.length > 40 ? 10 : columns.length > MANY_COLUMNS ? 4 : 1;
  for (const [stack, some] of Map.groupBy(columns, (column) => data.columns[column][0])) {
    stacks.append(made("th", "", stack, { scope: "colgroup", colspan: some.length }));
    for (const column of some) {
      const number = data.columns[column][1];
      numbers.append(made("th", number % step ? "skipped" : "", number, { scope: "col" }));
    }
  }
  return head;
}

function mapCell(unit, target) {
  const cell = made("td", "", "", { tabindex: "-1" });
  cell.unit = unit;
  cell.target = target;
  const numbers = unit[NUMBERS];
  if (typeof numbers === "string") {
    cell.className = "wrong";
    cell.textContent = "?";
  } else if (numbers[target] === null) {
    cell.className = "absent";
    cell.textContent = "–";
  } else {
    const weight = numbers[target][0];
    cell.className = unit[MOVED] ? "heat" : "heat still";
    cell.style.setProperty("--share", data.span ? ((weight - evenShare(unit)) / data.span).toFixed(3) : 0);
    cell.textContent = weight.toFixed(3);
  }
  return cell;
}

/** All there is to say of a cell, as parts of a sentence; the first is the most important. */
function describe(unit, target) {
  const numbers = unit[NUMBERS];
  const size = `${unit[ELEMENTS].toLocaleString("en")} elements in ${unit[TENSORS]} tensor${unit[TENSORS] > 1 ? "s" : ""}`;
  if (typeof numbers === "string") return ["cannot be merged", numbers, size];
  if (numbers[target] === null) return ["not in this target", size];
  const [weight, statistic] = numbers[target];
  const said = [`weight ${weight.toFixed(4)}`, `even share ${evenShare(unit).toFixed(3)}`];
  if (!unit[MOVED]) return [...said, "no target moved: the pivot is kept", size];
  return [...said, `statistic ${brief(statistic)}`, size];
}

/** The colours in seven steps, and what the other marks mean where they occur. */
function drawLegend(list, granularity) {
  const steps = data.span ? [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1] : [0];
  const swatches = steps.map((share) => [share, data.even + share * data.span]).filter(([, weight]) => weight > -1e-9 && weight < 1 + 1e-9);
  list.replaceChildren(...swatches.map(([share, weight]) => {
    const swatch = made("li", "heat", Math.abs(weight).toFixed(3));
    swatch.style.setProperty("--share", share);
    return swatch;
  }));
  const units = data.units[granularity];
  const marks = [
    ["still", data.even.toFixed(3), "no target moved: the pivot is kept", (unit) => !unit[MOVED]],
    ["absent", "–", "not in this target", (unit) => typeof unit[NUMBERS] !== "string" && unit[NUMBERS].includes(null)],
    ["wrong", "?", "cannot be merged", (unit) => typeof unit[NUMBERS] === "string"],
  ];
  for (const [className, sign, meaning, holds] of marks.filter((mark) => units.some(mark[3]))) {
    const item = made("li", "mark");
    item.append(made("span", className, sign), ` ${meaning}`);
    list.append(item);
  }
}

/** Arrow keys, Home and End move through the cells of the map that has the focus; Tab leaves it. */
function startWalking(maps) {
  let wanted = 1;  // the column to come back to after a row that has one cell only
  maps.addEventListener("focusin", ({ target: cell }) => {
    if (!cell.unit) return;
    cell.closest("table").querySelectorAll('td[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    cell.tabIndex = 0;
  });
  maps.addEventListener("keydown", (event) => {
    const cell = event.target;
    if (!cell.unit || event.altKey || event.metaKey) return;
    const next = neighbour(cell, event.key, event.ctrlKey, wanted);
    if (next === undefined) return;
    event.preventDefault();
    if (!next) return;
    if (!["ArrowUp", "ArrowDown"].includes(event.key)) wanted = next.cellIndex;
    next.focus();
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  maps.addEventListener("click", ({ target: cell }) => {
    if (cell.unit && cell.colSpan === 1) wanted = cell.cellIndex;
  });
}

/** The cell that a key leads to, null at the edge, undefined for a key that leads nowhere. */
function neighbour(cell, key, withControl, wanted) {
  const row = cell.parentElement;
  const rows = [...row.parentElement.rows];
  const walkable = (cells) => cells.find((one) => one.unit) ?? null;
  const at = (line) => line.cells[Math.min(wanted, line.cells.length - 1)];
  const [before, after] = [rows.slice(0, rows.indexOf(row)).reverse(), rows.slice(rows.indexOf(row) + 1)];
  const cells = [...row.cells];
  switch (key) {
    case "ArrowLeft": return walkable(cells.slice(0, cell.cellIndex).reverse());
    case "ArrowRight": return walkable(cells.slice(cell.cellIndex + 1));
    case "ArrowUp": return walkable(before.map(at));
    case "ArrowDown": return walkable(after.map(at));
    case "Home": return walkable(withControl ? [...rows[0].cells] : cells);
    case "End": return walkable((withControl ? [...rows.at(-1).cells] : cells).reverse());
    default: return undefined;
  }
}

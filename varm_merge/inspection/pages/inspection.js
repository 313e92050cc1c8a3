// The page of `inspect`: what is chosen is drawn.

const byId = (id) => document.getElementById(id);
const chosen = () => ({ granularity: byId("granularity").value, target: Number(byId("target").value) });

function drawMaps() {
  const { granularity, target } = chosen();
  const shown = target < 0 ? data.targets.map((_, index) => index) : [target];
  byId("maps").replaceChildren(...shown.map((one) => heatMap(granularity, one)));
  drawLegend(byId("legend"), granularity);
  byId("readout").hidden = true;
}

function readOut({ target: cell }) {
  if (!cell.unit) return;
  const [first, ...others] = describe(cell.unit, cell.target);
  byId("readout").hidden = false;
  byId("readout").replaceChildren(
    made("b", "name", cell.unit[NAME]), ` · ${data.targets[cell.target]}: `, made("b", "", first), ` · ${others.join(" · ")}`,
  );
}

/** The table under the maps, made when it is looked at. */
function fillUnits() {
  const { granularity } = chosen();
  const units = data.units[granularity];
  byId("units-label").textContent = data.labels[granularity];
  byId("units-number").textContent = `${units.length.toLocaleString("en")} unit${units.length > 1 ? "s" : ""}`;
  const table = byId("units");
  if (!byId("units-details").open || table.dataset.granularity === granularity) return;
  table.dataset.granularity = granularity;
  table.tBodies[0].replaceChildren(...units.map((unit) => {
    const line = made("tr");
    const numbers = unit[NUMBERS];
    const wrong = typeof numbers === "string";
    const remark = wrong ? numbers : unit[MOVED] ? "" : "no target moved: the pivot is kept";
    line.append(rowHead("name", unit[NAME]), made("td", "", unit[ELEMENTS].toLocaleString("en")));
    for (const target of data.targets.keys()) {
      line.append(made("td", "", wrong || numbers[target] === null ? "–" : numbers[target][0].toFixed(3)));
    }
    line.append(made("td", "text", remark));
    return line;
  }));
  [...table.tHead.rows[0].cells].forEach((head) => head.removeAttribute("aria-sort"));
}

/** Hide all but the first and the last of the tensors, in the order that the table has. */
function showEnds() {
  const rows = [...byId("tensors").tBodies[0].rows];
  const most = Number(byId("shown").value);
  rows.forEach((row, index) => {
    row.hidden = index >= most && index < rows.length - most;
    row.classList.toggle("gap", index > most && index === rows.length - most);
  });
}

byId("maps").addEventListener("pointerover", readOut);
byId("maps").addEventListener("focusin", readOut);
startWalking(byId("maps"));
byId("target").addEventListener("change", drawMaps);
byId("granularity").addEventListener("change", () => { drawMaps(); fillUnits(); });
byId("units-details").addEventListener("toggle", fillUnits);
drawMaps();
fillUnits();
if (byId("shown")) {
  byId("shown").addEventListener("change", showEnds);
  byId("tensors").addEventListener("sorted", showEnds);
  showEnds();
}
if (byId("plot")) startPlot(byId("plot"), data.depth, data.targets);

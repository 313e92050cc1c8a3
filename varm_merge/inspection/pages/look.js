// What all pages share: the theme, tables that sort, and the page's data.

const data = JSON.parse(document.getElementById("data").textContent);

function startTheme() {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const shown = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const tell = () => { button.textContent = shown() === "dark" ? "Light theme" : "Dark theme"; };
  button.addEventListener("click", () => {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    tell();
    try { localStorage.setItem("varm-merge theme", root.dataset.theme); } catch { /* forgotten, then */ }
  });
  system.addEventListener("change", tell);
  tell();
}

/** The cell as what it is sorted by: a number, a text, or null for a dash. */
function sortKey(cell) {
  if (cell.dataset.value !== undefined) return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  const text = cell.textContent.trim();
  const number = Number(text.replace(/[,\s%]/g, ""));
  return text === "" || text === "–" ? null : Number.isNaN(number) ? text : number;
}

const inOrder = new Intl.Collator("en", { numeric: true });  // layer 2 before layer 10

function compareKeys(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  return inOrder.compare(String(one), String(other));
}

function sortTable(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [sortKey(row.cells[column]), row]);
  const known = rows.filter(([key]) => key !== null);
  known.sort(([one], [other]) => (descending ? compareKeys(other, one) : compareKeys(one, other)));
  body.append(...known.concat(rows.filter(([key]) => key === null)).map(([, row]) => row));
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    if (index === column) head.ariaSort = descending ? "descending" : "ascending";
    else head.removeAttribute("aria-sort");
  });
  table.dispatchEvent(new Event("sorted"));
}

/** Give the table's headers buttons that sort: numbers from the greatest, text from the first, then the other way. */
function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if ("unsorted" in head.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => {
      const first = [...table.tBodies[0].rows].map((row) => sortKey(row.cells[column])).find((key) => key !== null);
      const descending = head.ariaSort ? head.ariaSort === "ascending" : typeof first === "number";
      sortTable(table, column, descending);
    });
    head.append(button);
  });
}

startTheme();
document.querySelectorAll("table.sortable").forEach(makeSortable);

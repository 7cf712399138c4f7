"use strict";

// Tables: a button in each header sorts by its column; what is no number, where others are, comes last.
const number = (text) => parseFloat(text.replaceAll(",", ""));

function compare(a, b, numeric, up) {
  if (!numeric) return (up ? 1 : -1) * a.localeCompare(b, "en", { numeric: true });
  const [x, y] = [number(a), number(b)];
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
  return (up ? 1 : -1) * (x - y);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [row.cells[column].textContent, row]);
      const numeric = !head.classList.contains("words") && rows.some(([text]) => !Number.isNaN(number(text)));
      rows.sort((a, b) => compare(a[0], b[0], numeric, up));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// Downloads: what the page carries, packed, becomes a file here.
async function save({ name, type, data }) {
  const packed = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const url = URL.createObjectURL(new Blob([await new Response(stream).arrayBuffer()], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

for (const file of JSON.parse(document.getElementById("files").textContent)) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = file.name;
  button.addEventListener("click", () => save(file));
  document.querySelector(".downloads").append(button);
}

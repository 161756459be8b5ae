"use strict";
// Tables in .sortable are sorted by a click on a heading; numbers by their value, gaps last.
for (const table of document.querySelectorAll(".sortable table")) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.tabIndex = 0;
    const sort = () => {
      const down = heading.getAttribute("aria-sort") !== "descending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map(row => {
        const text = row.cells[column].textContent.trim();
        const number = /^[<+-]? ?[0-9.]/.test(text) ? parseFloat(text.replace(/^[<+] ?/, "")) : NaN;
        return { row, text, number, gap: /^(–|not run|)$/.test(text) };
      });
      keyed.sort((a, b) => {
        if (a.gap || b.gap) return a.gap - b.gap;
        const order = isNaN(a.number) || isNaN(b.number)
          ? b.text.localeCompare(a.text) : b.number - a.number;
        return down ? order : -order;
      });
      body.append(...keyed.map(entry => entry.row));
    };
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
// What is wider than the page says so.
const hint = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const before = box.previousElementSibling;
    if (before?.classList.contains("hint")) {
      before.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    }
  }
};
addEventListener("resize", hint);
addEventListener("load", hint);
document.addEventListener("toggle", hint, true);

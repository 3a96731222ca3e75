// Sorts a part of the table by the column whose head is clicked; without this it is read as it is.
for (const table of document.querySelectorAll("table.scores")) {
  if (!table.querySelector("[data-row]")) continue; // a study's
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.querySelector(`[data-column="${column}"]`);
    return cell && cell.dataset.value !== "" ? cell.dataset.value : null;
  };
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const first = head.dataset.better === "higher" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = before === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => row.dataset.row !== undefined);
        rows.sort((one, two) => {
          const [a, b] = [value(one, column), value(two, column)];
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * compare(a, b);
        });
        body.append(...rows);
      }
    });
  });
}

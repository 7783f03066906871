// A click on a header sorts the results by that column: first from the best-known end, then the other way round.
document.querySelectorAll("#results thead th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const body = document.querySelector("#results tbody");
    const upwards = head.getAttribute("aria-sort") !== "ascending";
    const value = (row) => row.children[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // unknown ones stay at the end
      const order = column === 0 ? x.localeCompare(y) : Number(x) - Number(y);
      return upwards ? order : -order;
    };
    [...body.rows].sort(compare).forEach((row) => body.append(row));
    document.querySelectorAll("#results thead th").forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", upwards ? "ascending" : "descending");
  });
});

for (const form of document.querySelectorAll("form.filters")) {
  const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
  const boxes = [...form.querySelectorAll("details.filter")].map((filter) => ({
    said: filter.querySelector("summary span"),
    inputs: [...filter.querySelectorAll("input")],
    filter,
  }));
  const keys = rows.map((row) => row.dataset.keys.split(" ").map(Number));
  const total = form.querySelector("output");
  const apply = () => {
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !keys[i].every((key, place) => boxes[place].inputs[key].checked);
      shown += !row.hidden;
    });
    for (const box of boxes) {
      const chosen = box.inputs.filter((input) => input.checked).length;
      box.said.textContent = chosen === box.inputs.length ? "(all)" : chosen + " of " + box.inputs.length;
    }
    total.textContent = shown + " of " + rows.length + " rows";
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const box of boxes) {
    for (const button of box.filter.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        box.inputs.forEach((input) => { input.checked = button.dataset.all === "1"; });
        apply();
      });
    }
  }
  form.hidden = false;
  apply();
}

// The value of a curve under the pointer.
for (const chart of document.querySelectorAll(".chart")) {
  const { x, y, at } = JSON.parse(chart.dataset.points);
  const area = chart.querySelector(".area"), cursor = chart.querySelector(".cursor"), output = chart.querySelector("output");
  const last = () => { output.textContent = `step ${x.at(-1)}: ${y.at(-1)}`; cursor.style.display = "none"; };
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    let near = 0;
    at.forEach((value, i) => { if (Math.abs(value - share) < Math.abs(at[near] - share)) near = i; });
    cursor.style.display = "block";
    cursor.style.left = `${100 * at[near]}%`;
    output.textContent = `step ${x[near]}: ${y[near]}`;
  });
  area.addEventListener("pointerleave", last);
  last();
}

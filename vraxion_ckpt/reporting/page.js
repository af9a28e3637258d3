const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const widestUnlabelled = 1 / 24;  // on narrow screens, smaller parts of the ring have no label

function inColours(layout) {
  const ink = dark.matches ? "#e6e8eb" : "#1b1f24";
  const line = dark.matches ? "#4a525c" : "#d0d7de";
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
  const themed = {
    ...layout,
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: 13, family: "system-ui, sans-serif" },
    hoverlabel: { font: { size: 13 } },
  };
  for (const name of ["xaxis", "yaxis"]) {
    if (layout[name]) themed[name] = { ...layout[name], ...axis };
  }
  return themed;
}

function labelled(trace) {
  if (trace.name !== "labels" || !narrow.matches) return trace;
  return { ...trace, text: trace.text.map((id, i) => (trace.customdata[i] < widestUnlabelled ? "" : id)) };
}

function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data.map(labelled), inColours(figure.layout), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);

// Fronts of several studies in one chart.
import { ask } from "./base.js";
import { CONFIG, PALETTE, layout, staircase } from "./chart.js";

const compared = document.getElementById("compared"), chart = document.getElementById("chart");

async function load() {
  const all = await Promise.all(compared.dataset.studies.split(",").map((study) => ask(`/studies/${encodeURIComponent(study)}/chart`)));
  const first = all[0], traces = [];
  all.forEach((data, i) => {
    const color = PALETTE[i % PALETTE.length], front = data.confirmed.filter((p) => p.front && !p.disturbed);
    const steps = staircase(front, data.latency, data.quality, data.axes), of = (name, j) => front.map((p) => p.values[name][j]);
    const bars = (name) => ({ type: "data", symmetric: false, array: front.map((p) => p.values[name][2] - p.values[name][0]), arrayminus: front.map((p) => p.values[name][0] - p.values[name][1]), thickness: 1, width: 2, color });
    traces.push({ type: "scatter", mode: "lines", x: steps.map((p) => p[0]), y: steps.map((p) => p[1]), line: { shape: "hv", color, dash: "dot" }, showlegend: false, hoverinfo: "skip", legendgroup: data.study });
    traces.push({ type: "scatter", mode: "markers", name: data.study, legendgroup: data.study, x: of(data.latency, 0), y: of(data.quality, 0), error_x: bars(data.latency), error_y: bars(data.quality), marker: { color, size: 10 }, customdata: front.map((p) => [data.study, p.key]), text: front.map((p) => p.name), hovertemplate: "%{text}<extra>%{fullData.name}</extra>" });
  });
  const label = (name) => first.axes.find((axis) => axis.name === name)?.label ?? name;
  const paint = () => Plotly.react(chart, traces, layout(label(first.latency), label(first.quality), false), CONFIG);
  await paint();
  document.addEventListener("themechange", paint);
  chart.on("plotly_click", (event) => { const [study, key] = event.points[0].customdata ?? []; if (key) location.assign(`/studies/${encodeURIComponent(study)}/candidates/${key}`); });
}
if (compared) load().catch((error) => { chart.textContent = error.message; });

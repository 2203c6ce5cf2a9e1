// The front in two axes: confirmed points with their 95 % intervals, estimates hollow, the line that the front reaches.
import { colours } from "./base.js";

const ACCENT = "#12a37a", GOLD = "#f2b50c", GREY = "#808890", RED = "#d9453d", BLUE = "#2f7fe0";
export const PALETTE = [BLUE, "#ee7b1c", ACCENT, "#b83fb5", RED, "#8b6f2f", "#5560c9", GREY];
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"], showSendToCloud: false, plotlyServerURL: "" };

const escaped = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const number = (value) => Number(value).toPrecision(4).replace(/\.?0+$/, "");

function confirmed(points, x, y, style) {
  const of = (name, i) => points.map((p) => p.values[name][i]);
  const whiskers = (name) => ({ type: "data", symmetric: false, array: points.map((p) => p.values[name][2] - p.values[name][0]), arrayminus: points.map((p) => p.values[name][0] - p.values[name][1]), thickness: 1.2, width: 3, color: style.marker.color });
  return {
    type: "scatter", mode: "markers", x: of(x, 0), y: of(y, 0), error_x: whiskers(x), error_y: whiskers(y),
    customdata: points.map((p) => p.key),
    text: points.map((p) => `<b>${escaped(p.name)}</b> ${p.key.slice(0, 8)}<br>${escaped(p.description)}<br>` +
      Object.entries(p.values).map(([name, v]) => `${escaped(name)}: ${number(v[0])} [${number(v[1])}, ${number(v[2])}] ${v[3]}`).join("<br>")),
    hovertemplate: "%{text}<extra></extra>", ...style,
  };
}

export function staircase(points, x, y, axes) {
  const sign = (name) => (axes.find((axis) => axis.name === name)?.maximized ? -1 : 1);
  const sorted = points.filter((p) => !p.disturbed).map((p) => [p.values[x][0], p.values[y][0]])
    .sort((a, b) => sign(x) * (a[0] - b[0]) || sign(y) * (a[1] - b[1]));
  const steps = [];
  for (const [px, py] of sorted) if (!steps.length || sign(y) * (py - steps.at(-1)[1]) < 0) steps.push([px, py]);
  return steps;
}

export function layout(titleX, titleY, log) {
  const { ink, grid } = colours(), narrow = innerWidth < 600;
  const axis = { gridcolor: grid, zeroline: false, showline: true, linecolor: ink, ticks: "outside", automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow ? 11 : 13 }, height: narrow ? 440 : 560,
    margin: { l: narrow ? 46 : 64, r: 12, t: 16, b: 50 }, hovermode: "closest", legend: { orientation: "h", x: 0, y: narrow ? -0.24 : -0.16, yanchor: "top" },
    xaxis: { ...axis, title: { text: titleX }, type: log ? "log" : "linear" }, yaxis: { ...axis, title: { text: titleY } },
    uirevision: `${titleX} ${titleY} ${log}`,  // a zoom stays when points are added
    modebar: { bgcolor: "rgba(0,0,0,0)", color: GREY, activecolor: ACCENT },
  };
}

export function draw(where, data, { x, y, log, estimates, chosen }) {
  const label = (name) => data.axes.find((axis) => axis.name === name).label;
  const group = (test, name, marker) => confirmed(data.confirmed.filter(test), x, y, { name, marker });
  const front = staircase(data.confirmed.filter((p) => p.front), x, y, data.axes);
  const traces = [{ type: "scatter", mode: "lines", x: front.map((p) => p[0]), y: front.map((p) => p[1]), line: { shape: "hv", color: ACCENT, width: 1.5, dash: "dot" }, hoverinfo: "skip", name: "reached by the front" }];
  if (estimates && data.estimates.drawn) {
    const e = data.estimates;
    traces.push({ type: "scatter", mode: "markers", x: e.values[x], y: e.values[y], customdata: e.keys, text: e.names, hovertemplate: "%{text}, estimated<extra></extra>", name: "estimated (rung 0)", marker: { symbol: "circle-open", color: GREY, size: 6, opacity: 0.6 } });
  }
  traces.push(group((p) => p.disturbed, "disturbed, not ranked", { symbol: "x-thin", color: RED, size: 10, line: { color: RED, width: 2 } }));
  traces.push(group((p) => !p.disturbed && !p.front && !p.baseline, "confirmed, dominated", { symbol: "circle", color: GREY, size: 10 }));
  traces.push(group((p) => !p.disturbed && p.baseline, "teacher, unchanged", { symbol: "diamond", color: "#b83fb5", size: 12 }));
  traces.push(group((p) => !p.disturbed && p.front && !p.baseline, "front", { symbol: "circle", color: BLUE, size: 12 }));
  const star = data.confirmed.filter((p) => p.key === chosen);
  if (star.length) traces.push({ type: "scatter", mode: "markers", x: [star[0].values[x][0]], y: [star[0].values[y][0]], customdata: [chosen], hoverinfo: "skip", name: "recommended", marker: { symbol: "star", color: GOLD, size: 20, line: { color: "#6b4e00", width: 1 } } });
  const shown = traces.filter((trace) => trace.x.length);
  const told = layout(label(x), label(y), log);
  const worst = Math.max(...data.confirmed.map((p) => p.values[y][0])), best = Math.min(...data.confirmed.map((p) => p.values[y][0]));
  if (data.confirmed.length && estimates && y === data.quality) told.yaxis.range = [best - 0.08 * (worst - best || 1), worst + 0.6 * (worst - best || 1)];
  return Plotly.react(where, shown, told, CONFIG);
}

export { CONFIG };

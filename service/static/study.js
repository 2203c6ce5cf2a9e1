// A study's page: the live chart, limits that move the recommendation, progress, the four words.
import { ask, duration, element } from "./base.js";
import { draw } from "./chart.js";
import { follow, showState, steer } from "./live.js";

const page = document.getElementById("study"), { study, profile, own } = page.dataset;
const here = `/studies/${encodeURIComponent(study)}`, suffix = profile === own ? "" : `?profile=${encodeURIComponent(profile)}`;
const chart = document.getElementById("chart"), axes = document.getElementById("axes"), limits = document.getElementById("limits");
const advice = document.getElementById("advice");
let data = null, chosen = null, confirmed = null, wanted = 0;

function paint() {
  if (!data || !data.axes.length) return;
  draw(chart, data, { x: axes["x-axis"].value, y: axes["y-axis"].value, log: axes["x-log"].checked, estimates: axes.estimates.checked, chosen });
  const e = data.estimates;
  document.getElementById("chart-note").textContent = "Solid: confirmed, with 95 % intervals. Hollow: estimates" +
    (e.drawn < e.total ? ` (${e.drawn} of ${e.total} are drawn: the best, and others evenly)` : ` (${e.total})`) + ". A click opens a candidate." +
    (profile === own ? "" : data.kept ? ` Costs on ${profile}.` : ` Costs on ${profile} are predicted.`);
}

async function load() {
  data = await ask(`${here}/chart${suffix}`);
  chosen ??= data.recommended;
  for (const [id, first] of [["x-axis", data.latency], ["y-axis", data.quality]]) {
    const select = axes[id], kept = select.value || first;
    select.replaceChildren(...data.axes.map((axis) => element("option", { value: axis.name, textContent: axis.label, selected: axis.name === kept })));
  }
  paint();
  chart.removeAllListeners?.("plotly_click");
  chart.on?.("plotly_click", (event) => {
    const key = event.points[0]?.customdata;
    if (key) location.assign(`${here}/candidates/${key}`);
  });
}

function limitOf(slider) {
  const { low, high, scale } = slider.dataset, at = Number(slider.value);
  if (at >= 100) return null;
  return { shown: Number(low) * (Number(high) / Number(low)) ** (at / 99), scale: Number(scale) };
}

function showLimits() {
  for (const slider of limits.querySelectorAll("input[type=range]")) {
    const limit = limitOf(slider), text = limit ? `${Number(limit.shown.toPrecision(3))} ${slider.dataset.unit}` : "no limit";
    document.getElementById(`${slider.id}-shown`).textContent = text;
    slider.setAttribute("aria-valuetext", text);
  }
}

async function recommend() {
  const turn = ++wanted, query = new URLSearchParams();
  if (limits.goal.value) query.set("goal", limits.goal.value);
  if (profile !== own) query.set("profile", profile);
  for (const slider of limits.querySelectorAll("input[type=range]")) {
    const limit = limitOf(slider);
    if (limit) query.set(slider.name, String(limit.shown * limit.scale * (1 + 1e-9)));
  }
  let told;
  try { told = await ask(`/v1/studies/${encodeURIComponent(study)}/recommendation?${query}`); } catch (error) { advice.textContent = error.message; return; }
  if (turn !== wanted) return;
  const point = told.chosen ?? told.nearest, title = element("h3");
  if (!told.feasible) title.append("Nothing keeps these limits; the nearest is ");
  title.append(element("a", { href: `${here}/candidates/${point.key}`, textContent: point.name }), " ", element("code", { textContent: point.key.slice(0, 8) }));
  const items = [...told.why];
  if (told.ties.length) items.push(`tied with it in every objective: ${told.ties.map((key) => key.slice(0, 8)).join(", ")}`);
  if (told.price) items.push(`runner-up: ${told.price}`);
  for (const r of told.relaxed) items.push(`${r.limit} 10 % looser would buy ${r.gain}`);
  items.push(`the numbers are ${told.provenance}`);
  advice.replaceChildren(title, element("p", { textContent: point.description }), element("ul", {}, ...items.map((text) => element("li", { textContent: text }))));
  chosen = told.chosen?.key ?? null;
  for (const row of document.querySelectorAll("#front-table tr[data-key]")) row.classList.toggle("chosen", row.dataset.key === chosen);
  paint();
}

let timer = 0;
limits.addEventListener("input", () => { showLimits(); clearTimeout(timer); timer = setTimeout(recommend, 120); });
limits.addEventListener("submit", (event) => event.preventDefault());
limits.profile.addEventListener("change", () => location.assign(`${here}${limits.profile.value === own ? "" : `?profile=${encodeURIComponent(limits.profile.value)}`}`));
axes.addEventListener("change", paint);
axes.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("themechange", paint);

steer(study);
follow(study, (status) => {
  showState(status);
  if (status.explored === undefined) return;
  document.getElementById("spent").value = status.spent_s;
  document.getElementById("live").textContent = `${duration(status.spent_s)} of ${duration(status.budget_s)}${status.stage && status.state === "running" ? `, ${status.stage}` : ""}; ` +
    `${status.explored} explored, ${status.confirmed} confirmed, front of ${status.front - status.ties}, ${status.failures} failures`;
  const list = document.getElementById("events");
  const newest = list.firstElementChild?.lastElementChild?.textContent;
  for (const event of status.events.slice(status.events.findLastIndex((e) => e.text === newest) + 1)) {
    const cell = (textContent, className = "") => element("td", { textContent, className });
    list.prepend(element("tr", {}, cell(event.at.slice(0, 19).replace("T", " "), "nowrap"), cell(event.kind), cell(event.text)));
  }
  if (confirmed !== null && status.confirmed !== confirmed) {
    document.getElementById("chart-note").textContent = "a candidate was confirmed";
    location.reload();
    return;
  }
  confirmed = status.confirmed;
});
showLimits();
load().catch((error) => { chart.textContent = error.message; });

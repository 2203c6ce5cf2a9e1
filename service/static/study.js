// A study's page: the live chart, limits that move the recommendation, progress, the four words. What is chosen stands in the
// address, so that a link shows the same, and stays when something new is confirmed: the page is drawn again in place.
import { ask, element } from "./base.js";
import { draw } from "./chart.js";
import { clock, follow, showState, steer } from "./live.js";
import { redraw } from "./redraw.js";

const page = document.getElementById("study"), { study, profile, own } = page.dataset;
const here = `/studies/${encodeURIComponent(study)}`, suffix = profile === own ? "" : `?profile=${encodeURIComponent(profile)}`;
const chart = document.getElementById("chart"), axes = document.getElementById("axes"), limits = document.getElementById("limits");
const advice = document.getElementById("advice");
const EXPLORED_MS = 30_000;  // estimates alone are drawn again so often at most
let data = null, chosen = null, shown = null, wanted = 0, drawnAt = performance.now();

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
  if (!isLimited()) chosen = data.recommended;
  for (const [id, first] of [["x-axis", data.latency], ["y-axis", data.quality]]) {
    const select = axes[id], asked = select.value || new URLSearchParams(location.search).get(id[0]);
    const kept = data.axes.some((axis) => axis.name === asked) ? asked : first;
    select.replaceChildren(...data.axes.map((axis) => element("option", { value: axis.name, textContent: axis.label, selected: axis.name === kept })));
  }
  paint();
  chart.removeAllListeners?.("plotly_click");
  chart.on?.("plotly_click", (event) => {
    const key = event.points[0]?.customdata;
    if (key) location.assign(`${here}/candidates/${key}`);
  });
}

// A limit keeps its exact value until its slider is moved: the ends of the sliders change with the front.
function limitOf(slider) {
  const { low, high, scale, exact } = slider.dataset, at = Number(slider.value);
  if (exact) return { shown: Number(exact), scale: Number(scale) };
  if (at >= 100) return null;
  return { shown: Number(low) * (Number(high) / Number(low)) ** (at / 99), scale: Number(scale) };
}

function setLimit(slider, value) {
  const low = Number(slider.dataset.low), high = Number(slider.dataset.high);
  slider.dataset.exact = String(value);
  slider.value = Math.min(99, Math.max(0, Math.round((99 * Math.log(value / low)) / Math.log(high / low))));
}

const sliders = () => [...limits.querySelectorAll("input[type=range]")];
const isLimited = () => limits.goal.value !== "" || sliders().some((slider) => limitOf(slider));

function readAddress() {
  const asked = new URLSearchParams(location.search);
  if ([...limits.goal.options].some((option) => option.value === asked.get("goal"))) limits.goal.value = asked.get("goal");
  for (const slider of sliders()) {
    const value = Number(asked.get(slider.name)) / Number(slider.dataset.scale);
    if (value > 0 && Number.isFinite(value)) setLimit(slider, value);
  }
  axes["x-log"].checked = asked.get("log") === "1";
  axes.estimates.checked = asked.get("estimates") !== "0";
}

function writeAddress() {
  const query = new URLSearchParams();
  if (profile !== own) query.set("profile", profile);
  if (limits.goal.value) query.set("goal", limits.goal.value);
  for (const slider of sliders()) {
    const limit = limitOf(slider);
    if (limit) query.set(slider.name, String(Number((limit.shown * limit.scale).toPrecision(6))));
  }
  if (data && axes["x-axis"].value && axes["x-axis"].value !== data.latency) query.set("x", axes["x-axis"].value);
  if (data && axes["y-axis"].value && axes["y-axis"].value !== data.quality) query.set("y", axes["y-axis"].value);
  if (axes["x-log"].checked) query.set("log", "1");
  if (!axes.estimates.checked) query.set("estimates", "0");
  const text = query.toString();
  history.replaceState(null, "", text ? `${location.pathname}?${text}` : location.pathname);
}

function showLimits() {
  for (const slider of sliders()) {
    const limit = limitOf(slider), text = limit ? `${Number(limit.shown.toPrecision(3))} ${slider.dataset.unit}` : "no limit";
    document.getElementById(`${slider.id}-shown`).textContent = text;
    slider.setAttribute("aria-valuetext", text);
  }
}

async function recommend() {
  const turn = ++wanted, query = new URLSearchParams();
  if (limits.goal.value) query.set("goal", limits.goal.value);
  if (profile !== own) query.set("profile", profile);
  for (const slider of sliders()) {
    const limit = limitOf(slider);
    if (limit) query.set(slider.name, String(limit.shown * limit.scale * (1 + 1e-9)));
  }
  let told;
  try { told = await ask(`/v1/studies/${encodeURIComponent(study)}/recommendation?${query}`); } catch (error) { advice.textContent = error.message; return; }
  if (turn !== wanted) return;
  const point = told.chosen ?? told.nearest, title = element("h3");
  if (!told.feasible) title.append("No candidate meets these limits; the nearest is ");
  title.append(element("a", { href: `${here}/candidates/${point.key}`, textContent: point.name }), " ", element("code", { textContent: point.key.slice(0, 8) }));
  const items = [...told.why];
  if (told.ties.length) items.push(`tied with it in every objective: ${told.ties.map((key) => key.slice(0, 8)).join(", ")}`);
  if (told.price) items.push(`runner-up: ${told.price}`);
  for (const r of told.relaxed) items.push(`${r.limit} 10 % looser would buy ${r.gain}`);
  items.push(`the numbers are ${told.provenance}`);
  advice.replaceChildren(title, element("p", { textContent: point.description }), element("ul", {}, ...items.map((text) => element("li", { textContent: text }))));
  chosen = told.chosen?.key ?? null;
  mark();
  paint();
}

function mark() {
  for (const row of document.querySelectorAll("#front-table tr[data-key]")) row.classList.toggle("chosen", isLimited() && row.dataset.key === chosen);
}

// New ends for the sliders, and those that the front has only now; what was set stays set.
function renewSliders(fresh) {
  for (const other of fresh.querySelectorAll("#sliders input")) {
    const slider = document.getElementById(other.id);
    if (!slider) { document.getElementById("sliders").append(document.importNode(other.closest("p"), true)); continue; }
    const limit = limitOf(slider);
    Object.assign(slider.dataset, { low: other.dataset.low, high: other.dataset.high });
    if (limit) setLimit(slider, limit.shown);
  }
  showLimits();
}

async function renew() {
  drawnAt = performance.now();
  renewSliders(await redraw());
  await load();
  mark();
  if (data.confirmed.length) await recommend();
}

let timer = 0;
limits.addEventListener("input", (event) => {
  delete event.target.dataset.exact;
  showLimits();
  clearTimeout(timer);
  timer = setTimeout(() => { writeAddress(); recommend(); }, 120);
});
limits.addEventListener("submit", (event) => event.preventDefault());
limits.profile.addEventListener("change", () => {
  const query = new URLSearchParams(location.search);
  query.set("profile", limits.profile.value);
  if (limits.profile.value === own) query.delete("profile");
  location.assign(query.size ? `${here}?${query}` : here);
});
axes.addEventListener("change", () => { writeAddress(); paint(); });
axes.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("themechange", paint);
document.getElementById("copy").addEventListener("click", async () => {
  const told = document.getElementById("copied");
  try { await navigator.clipboard.writeText(location.href); told.textContent = "copied"; } catch { told.textContent = "this browser does not allow it; copy it from the address bar"; }
});

const time = clock(document.getElementById("time"), document.getElementById("spent"));
steer(study);
follow(study, (status) => {
  showState(status);
  if (status.explored === undefined) return;
  time(status.elapsed_s, status.spent_s, status.budget_s);
  document.getElementById("stage").textContent = status.state === "running" ? `, ${status.stage ?? "starting"}` : "";
  document.getElementById("doing").replaceChildren(...(status.doing ?? []).map((d) => element("li", { textContent: d.candidate ? `${d.stage}: ${d.candidate}` : d.stage })));
  const counts = document.getElementById("counts"), counted = `${status.explored} explored, ${status.confirmed} confirmed, front of ${status.front - status.ties}, ${status.failures} failures`;
  const isOld = profile === own && counts.textContent !== counted;
  if (profile === own) counts.textContent = counted;
  const list = document.getElementById("events");
  const newest = list.firstElementChild?.lastElementChild?.textContent;
  for (const event of status.events.slice(status.events.findLastIndex((e) => e.text === newest) + 1)) {
    const cell = (textContent, className = "") => element("td", { textContent, className });
    list.prepend(element("tr", {}, cell(event.at.slice(0, 19).replace("T", " "), "nowrap"), cell(event.kind), cell(event.text)));
  }
  const before = shown, now = [status.confirmed, status.front, status.ties, status.targets.length, status.state].join();
  shown = { now, explored: status.explored };
  if (before === null) { if (isOld) renew().catch(() => {}); return; }
  if (before.now !== now || (status.explored !== before.explored && performance.now() - drawnAt > EXPLORED_MS)) renew().catch(() => {});
});
readAddress();
showLimits();
load().then(() => { if (isLimited()) recommend(); }).catch((error) => { chart.textContent = error.message; });

// A study's progress as it comes, the clock between two reports, and the four words to it.
import { ask, duration, found } from "./base.js";

const RESTING = ["paused", "interrupted", "failed"], LIVE = ["running", "queued"];
const OVER = ["complete", "cancelled", "failed"], HERE_MS = 30_000;

// Through the worker that all tabs share (shared.js); a browser without one asks every few seconds, seldom while hidden.
export function follow(study, told) {
  if (!globalThis.SharedWorker) { poll(study, told); return; }
  const version = document.documentElement.dataset.version, worker = new SharedWorker("/static/shared.js", { name: `paretune ${version}` });
  worker.addEventListener("error", () => poll(study, told), { once: true });
  const { port } = worker, say = (message) => port.postMessage(message);
  port.onmessage = ({ data: { kind, data } }) => {
    if (kind === "lost") { ask(`/v1/studies/${encodeURIComponent(study)}`).catch(() => {}); return; }  // which says in the banner what it is
    found();
    if (kind === "status") told(data);
  };
  port.start();
  say({ follow: [study] });
  setInterval(() => say({ here: true }), HERE_MS);
  addEventListener("pagehide", () => say({ bye: true }));
  addEventListener("pageshow", (event) => { if (event.persisted) say({ follow: [study] }); });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) say({ here: true }); });
}

async function poll(study, told) {
  let over = false;
  try {
    const status = await ask(`/v1/studies/${encodeURIComponent(study)}`);
    told({ events: [], ...status });
    over = OVER.includes(status.state);
  } catch { /* said in the banner; the next turn tries again */ }
  if (!over) setTimeout(() => poll(study, told), document.hidden ? 30_000 : 2000);
}

// Shows in `where` how much of the budget is used: as it was reported, and on by the clock of this page while the search runs.
export function clock(where, bar = null, text = (elapsed, budget) => `${duration(elapsed)} of ${duration(budget)}`) {
  let elapsed = null, since = 0, budget = 0;
  const show = () => {
    if (elapsed === null) return;
    const used = elapsed + (performance.now() - since) / 1000;
    where.textContent = text(used, budget);
    if (bar) bar.value = used;
  };
  const set = (running, spent, whole) => {
    [elapsed, since, budget] = [running ?? null, performance.now(), whole];
    if (elapsed !== null) show();
    else if (spent !== undefined) { where.textContent = text(spent, whole); if (bar) bar.value = spent; }
  };
  if (where.dataset.elapsed) set(Number(where.dataset.elapsed), undefined, Number(where.dataset.budget));
  setInterval(show, 1000);
  return set;
}

export function showState(status) {
  const { state } = status, badge = document.getElementById("state");
  badge.textContent = state;
  badge.className = `state ${state}`;
  for (const button of document.querySelectorAll("#actions button")) {
    const verb = button.dataset.verb;
    const rests = RESTING.includes(state);
    button.disabled = verb === "resume" ? !rests : verb === "pause" ? !LIVE.includes(state) : !(rests || LIVE.includes(state));
  }
}

export function steer(study) {
  const told = document.getElementById("told-action");
  document.getElementById("actions").addEventListener("click", async (event) => {
    const verb = event.target.dataset?.verb;
    if (!verb) return;
    if (["stop", "cancel"].includes(verb) && !confirm(`${verb} ${study}? It cannot be resumed afterwards.`)) return;
    told.textContent = "…";
    try {
      const job = await ask(`/v1/studies/${encodeURIComponent(study)}/${verb}`, {});
      told.textContent = `${study} is ${job.state}`;
      showState({ state: job.state, job });
    } catch (error) {
      told.textContent = [error.message, error.remedy].filter(Boolean).join(": ");
    }
  });
}

// A study's progress as it comes, and the four words to it.
import { ask } from "./base.js";

const RESTING = ["paused", "interrupted", "failed"], LIVE = ["running", "queued"];

export function follow(study, told) {
  const source = new EventSource(`/v1/studies/${encodeURIComponent(study)}/events`);
  source.addEventListener("status", (event) => told(JSON.parse(event.data)));
  source.addEventListener("end", () => source.close());
  addEventListener("pagehide", () => source.close());
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

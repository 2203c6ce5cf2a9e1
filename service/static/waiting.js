// A search that has not begun: as soon as it has a study, its page is shown.
import { follow, showState, steer } from "./live.js";

const study = document.getElementById("study").dataset.study, told = document.getElementById("told");
steer(study);
follow(study, (status) => {
  if (status.explored !== undefined) { location.reload(); return; }
  showState(status);
  told.textContent = [status.job?.position ? `Place ${status.job.position} in the queue.` : status.job?.state === "running" ? "The search is starting." : "", status.job?.reason ?? ""].join(" ").trim();
});

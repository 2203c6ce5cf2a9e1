// One stream of progress for all tabs of a browser, which has six connections to a service: a shared worker holds it. A tab says
// which studies it follows and that it is still there; a tab that has not said so for long is forgotten.
const FORGET_MS = 150_000, tabs = new Map();
let source = null, open = "", timer = 0;

function tell(kind, data, test = () => true) {
  for (const [port, tab] of tabs) if (test(tab)) port.postMessage({ kind, data });
}

function wanted() {
  const names = new Set();
  for (const tab of tabs.values()) for (const study of tab.studies) names.add(study);
  return [...names].sort().slice(0, 50).join(",");
}

function connect() {
  if (wanted() === open && source && source.readyState !== EventSource.CLOSED) return;
  source?.close();
  source = null;
  open = wanted();
  if (!open) return;
  source = new EventSource(`/v1/events?studies=${encodeURIComponent(open)}`);
  source.addEventListener("open", () => tell("open"));
  source.addEventListener("status", (event) => {
    const data = JSON.parse(event.data);
    tell("status", data, (tab) => tab.studies.has(data.study));
  });
  source.addEventListener("end", (event) => {
    const { study } = JSON.parse(event.data);
    for (const tab of tabs.values()) tab.studies.delete(study);
    if (!wanted()) { source.close(); source = null; open = ""; }
  });
  source.addEventListener("error", () => { tell("lost"); later(3000); });
}

function later(milliseconds) {
  clearTimeout(timer);
  timer = setTimeout(connect, milliseconds);
}

setInterval(() => {
  for (const [port, tab] of tabs) if (Date.now() - tab.heard > FORGET_MS) tabs.delete(port);
  connect();
}, 30_000);

addEventListener("connect", (event) => {
  const [port] = event.ports;
  port.onmessage = ({ data }) => {
    if (data.follow) {
      tabs.set(port, { studies: new Set(data.follow), heard: Date.now() });
      if (source && data.follow.every((study) => open.split(",").includes(study))) { source.close(); source = null; }  // its status at once
      later(50);
    } else if (data.bye) { tabs.delete(port); later(1000); }
    else if (tabs.has(port)) tabs.get(port).heard = Date.now();
  };
});

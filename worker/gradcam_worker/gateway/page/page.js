// The page: submit photos, watch them, look at the results. It uses the HTTP API and nothing else.

const HISTORY = 20;  // jobs that are asked for at once
const POLL_MS = 2500;  // between two looks at jobs that are not final
const RECONNECT_MS = 2000;
const PASSING = [429, 502, 503, 504];  // too many requests, or a server that stops or starts
const UPLOADS_AT_ONCE = 3;
const KEY = "gradcam-api-key";  // in sessionStorage: of this tab alone
const FINAL = ["succeeded", "failed", "canceled", "expired"];
const DOING = {
  queued: "Waiting for a worker", running: "Running", retrying: "Waiting to try again",
  fetch: "Reading the photo", decode: "Decoding the photo", load: "Loading the network",
  explain: "Computing the heatmaps", render: "Drawing", upload: "Storing the pictures",
};
const STATES = {
  queued: "waits", running: "runs", retrying: "waits", succeeded: "done", failed: "failed",
  canceled: "canceled", expired: "expired",
};

const $ = (id) => document.getElementById(id);
const jobs = new Map();  // status documents by id
const sending = [];  // photos on their way: {name, body, key, state, problem}
let networks = [];
let cursor;  // of the older jobs; null: there are none
let shownId, following;  // the job that is shown, and the controller of its events
let polling;

// ---------------------------------------------------------------- the API

class Problem extends Error {
  constructor(detail, status = 0, hopeless = false) { super(detail); Object.assign(this, { status, hopeless }); }
}

// One request. Raises Problem with a sentence for the visitor.
async function call(path, { headers, ...options } = {}) {
  const sent = new Headers(headers), key = sessionStorage.getItem(KEY);
  if (key) sent.set("Authorization", `Bearer ${key}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: sent, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Please try again.");
  }
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 401) askForKey(key ? problem.detail : "");
  const more = (problem.errors ?? []).map((one) => `${(one.pointer ?? one.parameter ?? "").replace(/^#\//, "")}: ${one.detail}`);
  const told = more.length ? more.join("\n") : problem.detail ?? `The server answered ${answer.status}.`;
  throw new Problem(told, answer.status, problem.retryable === false && ![401, 403].includes(answer.status));
}

const read = async (path, options) => (await call(path, options)).json();

// The documents of a job, as they come; the final one is the last. A connection that ends is opened again.
async function* follow(id, signal) {
  for (let last = ""; ;) {
    try {
      const answer = await call(`v1/jobs/${id}/events`, { headers: last ? { "Last-Event-ID": last } : {}, signal });
      if (answer.status === 204) return;
      for await (const event of events(answer.body)) {
        if (event.name === "problem") throw new Problem(JSON.parse(event.data).detail);
        if (event.name !== "status") continue;
        last = event.id;
        const job = JSON.parse(event.data);
        yield job;
        if (FINAL.includes(job.status)) return;
      }
    } catch (error) {
      if (error.name === "AbortError" || (error.status && !PASSING.includes(error.status))) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, RECONNECT_MS));
    signal.throwIfAborted();
  }
}

// The events of a stream, by the rules of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", event = { name: "message", id: "", data: "" };
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
      if (line === "") {
        if (event.data) yield event;
        event = { name: "message", id: event.id, data: "" };
      } else if (field === "event") event.name = text;
      else if (field === "id") event.id = text;
      else if (field === "data") event.data += text;
    }
  }
}

// ---------------------------------------------------------------- the key

function askForKey(why) {
  $("key-why").textContent = why || "The key is kept in this tab alone, until it is closed.";
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-open").onclick = () => askForKey("");
$("key-close").onclick = () => $("key-dialog").close();
$("key-forget").onclick = () => { sessionStorage.removeItem(KEY); location.reload(); };
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (!key) return;
  sessionStorage.setItem(KEY, key);
  $("key-dialog").close();
  start();
};

// ---------------------------------------------------------------- the form

async function readNetworks() {
  networks = (await read("v1/networks")).networks;
  const before = $("network").value;
  $("network").replaceChildren(...networks.map(({ name }) => new Option(name)));
  const names = networks.map((one) => one.name);
  $("network").value = [before, "efficientnet_lite0", names[0]].find((name) => names.includes(name)) ?? "";
  $("go").disabled = $("try").disabled = !networks.length;
  $("note").textContent = networks.length ? "" : "No worker runs just now, so no network can be chosen. This page looks again by itself.";
  describeNetwork();
}

function describeNetwork() {
  const network = networks.find((one) => one.name === $("network").value);
  const facts = [];
  if (network?.imagenet) facts.push("the 1000 classes of ImageNet");
  else if (network?.classes) facts.push(`${network.classes} classes`);
  if (network?.input_size) facts.push(`sees ${network.input_size[1]} x ${network.input_size[0]} pixels`);
  if (network?.scores_only) facts.push("explained by its scores alone, which takes longer");
  $("network-facts").textContent = facts.join(", ");
  $("inputs").replaceChildren(...(network?.inputs ?? []).map((name) => {
    const input = Object.assign(make("input", "", ""), { id: `input-${name}` });
    input.dataset.name = name;
    const field = make("div", "field", "");
    field.append(Object.assign(make("label", "", name), { htmlFor: input.id }), input,
      make("p", "small", `${network.name} takes it beside the photo.`));
    return field;
  }));
  const labels = network?.labels ?? [];
  $("labels").replaceChildren(...labels.map((name) => {
    const label = make("label", "choice", "");
    label.append(Object.assign(document.createElement("input"), { type: "checkbox", value: name }), make("span", "", name));
    return label;
  }));
  showClasses();
}

// Either the network's own few classes, to be ticked, or a field for names.
function showClasses() {
  const named = $("which-named").checked, few = $("labels").childElementCount > 0;
  $("classes").hidden = !named || few;
  $("labels").hidden = !named || !few;
  $("named-text").textContent = few ? "These:" : "These, one on each line:";
  $("top").disabled = named;
}

function target() {
  if (!$("which-named").checked) return { top_n: Number($("top").value) || 3 };
  const ticked = [...$("labels").querySelectorAll(":checked")].map((box) => box.value);
  const written = $("labels").childElementCount ? ticked : linesOf("classes");
  return { classes: written.map((name) => /^\d+$/.test(name) ? Number(name) : name) };
}

const linesOf = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);

function describeChoice() {
  const files = [...$("photos").files];
  $("chosen").textContent = files.length > 1 ? `${files.length} photos: ${files.map((file) => file.name).join(", ")}` : "";
}

// What is submitted: a body for each photo, under a key of its own, so that a second try is the same job.
function wanted() {
  const inputs = Object.fromEntries([...$("inputs").querySelectorAll("input")].map(({ dataset, value }) =>
    [dataset.name, value.trim() !== "" && !Number.isNaN(Number(value)) ? Number(value) : value]));
  const fields = { network: $("network").value, target: target() };
  if (Object.keys(inputs).length) fields.inputs = inputs;
  const photos = [...$("photos").files].map((file) => {
    const body = new FormData();
    for (const [name, value] of Object.entries({ ...fields, metadata: { name: file.name.slice(0, 200) } })) {
      body.append(name, typeof value === "string" ? value : JSON.stringify(value));
    }
    body.append("image", file);
    return { name: file.name, file, body, headers: {} };
  });
  const addresses = linesOf("addresses").map((image) => {
    const name = image.split("/").pop() || image;
    const body = JSON.stringify({ ...fields, image, metadata: { name: name.slice(0, 200) } });
    return { name, address: image, body, headers: { "Content-Type": "application/json" } };
  });
  return [...photos, ...addresses].map((one) => ({ ...one, key: randomKey(), state: "waits to be sent" }));
}

const randomKey = () => [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(36)).join("-");

$("form").onsubmit = async (event) => {
  event.preventDefault();
  const asked = wanted();
  $("problem").textContent = "";
  if (!asked.length) return void ($("problem").textContent = "Choose a photo, or paste an address.");
  if (!asked[0].body || (target().classes && !target().classes.length)) {
    return void ($("problem").textContent = "Say which classes, or choose the most probable ones.");
  }
  show(undefined);
  sending.splice(0, sending.length, ...asked, ...sending.filter((one) => !one.problem));
  renderSending();
  $("go").disabled = true;
  const queue = [...asked];
  let first = true;
  await Promise.all(Array.from({ length: UPLOADS_AT_ONCE }, async () => {
    for (let one = queue.shift(); one; one = queue.shift()) {
      const id = await send(one);
      if (id && first) { first = false; location.hash = `job/${id}`; }
    }
  }));
  $("go").disabled = !networks.length;
  const refused = asked.filter((one) => sending.includes(one));  // they stay to be corrected, no others
  choose(refused.flatMap(({ file }) => file ?? []));
  $("addresses").value = refused.flatMap(({ address }) => address ?? []).join("\n");
};

// Submit one photo; the id of its job, or nothing where it was refused.
async function send(one) {
  one.state = "is sent";
  one.problem = "";
  renderSending();
  try {
    const headers = { ...one.headers, "Idempotency-Key": one.key };
    const job = await read("v1/jobs", { method: "POST", headers, body: one.body });
    sending.splice(sending.indexOf(one), 1);
    keep([job]);
    return job.id;
  } catch (error) {
    one.state = "refused";
    one.problem = error.message;
    one.hopeless = error.hopeless;
    if (sending.length === 1 || sending.every((other) => other.problem === one.problem)) $("problem").textContent = error.message;
    return undefined;
  } finally {
    renderSending();
  }
}

function renderSending() {
  $("sending").replaceChildren(...sending.map((one) => {
    const item = make("li", "", "");
    item.append(make("span", "name", one.name), make("span", `state ${one.state}`, one.state));
    if (one.problem) {
      item.append(make("span", "about", one.problem));
      const buttons = make("span", "about actions", "");
      const remove = () => { sending.splice(sending.indexOf(one), 1); renderSending(); };
      for (const [text, act] of [...(one.hopeless ? [] : [["Try again", () => send(one)]]), ["Remove", remove]]) {
        buttons.append(Object.assign(make("button", "quiet", text), { type: "button", onclick: act }));
      }
      item.append(buttons);
    }
    return item;
  }));
}

// The photo that comes with the page goes the way of any other.
$("try").onclick = async () => {
  const photo = await (await call($("sample").src)).blob();
  choose([new File([photo], "cat.jpg", { type: photo.type })]);
  $("form").requestSubmit();
};

function choose(files) {
  const photos = new DataTransfer();
  for (const file of files) photos.items.add(file);
  $("photos").files = photos.files;
  describeChoice();
}

$("network").onchange = describeNetwork;
$("form").addEventListener("change", () => { describeChoice(); showClasses(); });
for (const name of ["dragenter", "dragover"]) {
  addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const photos = [...event.dataTransfer.files].filter((file) => file.type.startsWith("image/"));
  if (photos.length) choose(photos);
  $("problem").textContent = photos.length ? "" : "That is no photo.";
});

// ---------------------------------------------------------------- the history

// Take in documents: of each job the latest revision counts.
function keep(documents) {
  for (const job of documents) {
    if ((jobs.get(job.id)?.revision ?? -1) <= job.revision) jobs.set(job.id, job);
  }
  renderList();
  clearTimeout(polling);
  polling = setTimeout(poll, POLL_MS);
}

async function poll() {
  try {
    if (!document.hidden && !$("key-dialog").open) {
      if ([...jobs.values()].some((one) => !FINAL.includes(one.status) && one.id !== shownId)) {
        keep((await read(`v1/jobs?limit=${HISTORY}`)).jobs);
      }
      if (!networks.length) await readNetworks();
    }
  } catch { /* the next look may go well */ }
  clearTimeout(polling);
  polling = setTimeout(poll, POLL_MS);
}

async function readHistory(from) {
  const page = await read(`v1/jobs?limit=${HISTORY}${from ? `&cursor=${encodeURIComponent(from)}` : ""}`);
  cursor = page.cursor;
  keep(page.jobs);
  $("older").hidden = !cursor;
}

$("older").onclick = async () => {
  $("older").disabled = true;
  await readHistory(cursor).catch((error) => { $("problem").textContent = error.message; });
  $("older").disabled = false;
};

const nameOf = (job) => job.metadata?.name || `Job ${job.id.slice(-8)}`;
const dateOf = (job) => new Date(job.created_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
const best = ({ predictions: [one] }) => one && `${one.name.replaceAll("_", " ")}, ${(100 * one.probability).toFixed(1)} %`;

function renderList() {
  const sorted = [...jobs.values()].sort((one, other) => other.created_at.localeCompare(one.created_at));
  const items = new Map([...$("list").children].map((item) => [item.dataset.id, item]));
  $("list").replaceChildren(...sorted.map((job) => {
    const item = items.get(job.id) ?? make("li", "", "");  // kept, so that the focus stays
    item.dataset.id = job.id;
    const link = item.firstChild ?? item.appendChild(make("a", "", ""));
    link.href = `#job/${job.id}`;
    if (job.id === shownId) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    const about = [dateOf(job), job.network?.name, best(job)].filter(Boolean).join(" · ");
    link.replaceChildren(
      make("span", "name", nameOf(job)), make("span", `state ${job.status}`, STATES[job.status] ?? job.status),
      make("span", "about", about));
    return item;
  }));
  $("empty").hidden = sorted.length + sending.length > 0;
}

// ---------------------------------------------------------------- one job

// The address names the job, so that Back, Forward, a reload and a link lead to it.
addEventListener("hashchange", () => { showAddressed(); $("job-title").focus(); });

function showAddressed() {
  show(/^#job\/([\w-]{1,64})$/.exec(location.hash)?.[1]);
}

async function show(id) {
  following?.abort();
  following = new AbortController();
  shownId = id;
  $("viewer").hidden = $("files-box").hidden = true;
  $("shown").hidden = !id;
  $("nothing").hidden = Boolean(id);
  $("shared").textContent = $("job-problem").textContent = $("waiting").textContent = "";
  renderList();
  if (!id) return;
  const { signal } = following;
  if (jobs.has(id)) render(jobs.get(id)); else renderUnknown("Asking how it is");
  try {
    let job = jobs.get(id);
    if (!FINAL.includes(job?.status)) {
      for await (job of follow(id, signal)) {
        keep([job]);
        render(job);
        if (job.status === "queued") await noteWorkers(signal);
      }
    }
    job ??= await read(`v1/jobs/${id}`, { signal });
    if (job.status === "succeeded") await look(job, signal);
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    if (!jobs.has(id)) renderUnknown("");
    $("progress").hidden = true;
    $("job-problem").textContent = error.message;
  }
}

async function noteWorkers(signal) {
  await readNetworks();
  if (!signal.aborted && !networks.length) $("waiting").textContent = "No worker runs just now. The photo is kept, and explained as soon as one does.";
}

async function look(job, signal) {
  const data = await read(`v1/jobs/${job.id}/viewer`, { signal });
  signal.throwIfAborted();
  $("viewer").data = data;
  $("viewer").hidden = false;
  $("files").replaceChildren(...Object.entries(data.urls ?? {}).map(([uri, url]) => {
    const item = make("li", "", "");
    item.append(Object.assign(make("a", "", uri.split("/").pop()), { href: url, target: "_blank", rel: "noopener" }));
    return item;
  }));
  $("files-box").hidden = !$("files").childElementCount;
}

function renderUnknown(told) {
  $("job-title").textContent = "Job";
  $("job-facts").textContent = "";
  $("progress").hidden = !told;
  $("told").textContent = told;
  $("cancel").hidden = $("retry").hidden = true;
}

function render(job) {
  const final = FINAL.includes(job.status), { passes } = job;
  $("job-title").textContent = nameOf(job);
  $("job-facts").textContent = [dateOf(job), job.network?.name, best(job)].filter(Boolean).join(" · ");
  $("progress").hidden = final;
  $("told").textContent = [DOING[job.stage] ?? DOING[job.status] ?? "", passes ? `pass ${passes.done} of ${passes.total}` : ""].filter(Boolean).join(", ");
  if (passes?.total) { $("bar").max = passes.total; $("bar").value = passes.done; } else $("bar").removeAttribute("value");
  if (job.status !== "queued") $("waiting").textContent = "";
  const said = job.error && final ? [job.error.public_message, job.error.detail] : [];  // a tenant's are the same
  $("job-problem").textContent = [...new Set(said)].join("\n");
  $("cancel").hidden = final;
  $("cancel").disabled = Boolean(job.cancel_requested_at);
  $("retry").hidden = job.status !== "failed";
}

async function act(name) {
  const id = shownId;
  try {
    keep([await read(`v1/jobs/${id}/${name}`, { method: "POST" })]);
    if (id === shownId) show(id);
  } catch (error) {
    $("job-problem").textContent = error.message;
  }
}

$("cancel").onclick = () => act("cancel");
$("retry").onclick = () => act("retry");
$("share").onclick = async () => {
  try {
    await navigator.clipboard.writeText(location.href);
    $("shared").textContent = "The link is copied.";
  } catch {
    $("shared").textContent = location.href;  // no clipboard without HTTPS
  }
};

// ----------------------------------------------------------------

function make(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

async function start() {
  $("problem").textContent = "";
  try {
    await Promise.all([readNetworks(), readHistory()]);
  } catch (error) {
    $("problem").textContent = error.message;
    keep([]);
  }
  showAddressed();
}

start();

"""Where did the network look? A page for a photo, or for the address of one. Copy it.

    pip install gradcam-worker 'fastapi>=0.135' uvicorn
    uvicorn --app-dir docs/examples fastapi_app:app

In its environment: what `gradcam worker` has there (GRADCAM_BROKER_URL, the bucket's keys), and
GRADCAM_UPLOADS=s3://bucket/prefix. Photo and heatmaps come to the browser straight from the bucket, by
addresses that are good for an hour. Who may use the page is yours to say: put your login in front of it.
"""

import logging
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from worker.aio import AsyncGradcamClient
from worker.errors import GradcamError, LocalError, UnknownJob

LARGEST_MB = 16
OVERLAY = {"kind": "overlay", "alpha": 1.0, "max_edge": 1280}  # heatmap alone: the page lays it over the photo
WISH = {"network": "efficientnet_lite0", "target": {"top_n": 3}, "artifacts": [OVERLAY]}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests, closed with the app."""
    async with AsyncGradcamClient() as app.state.client:
        yield


app = FastAPI(lifespan=lifespan, openapi_url=None)
Key = Annotated[str, Query(min_length=16, max_length=64)]


@app.post("/jobs", status_code=202)
async def submit(request: Request, key: Key, uri: str = "") -> dict[str, str]:
    """The body is the photo, or `uri` says where it is. With the same `key` it is the same job."""
    client, wish = request.app.state.client, {**WISH, "idempotency_key": f"page {key}"}
    if uri:
        return {"id": await client.submit(image=uri, **wish)}
    photo = bytearray()
    async for chunk in request.stream():
        photo += chunk
        if len(photo) > LARGEST_MB * 10**6:
            raise HTTPException(413, f"A photo may have {LARGEST_MB} MB; this one has more.")
    return {"id": await client.upload_and_submit(bytes(photo), **wish)}


@app.get("/jobs/{job_id}", response_class=EventSourceResponse)
async def follow(request: Request, job_id: str) -> AsyncIterator[ServerSentEvent]:
    """What becomes of a job, as it happens; until it is final, or the browser has gone."""
    client = request.app.state.client
    try:
        async for document in client.stream(job_id):
            yield ServerSentEvent(event="progress", data=document.stage or document.status)
        if document.error:
            yield ServerSentEvent(event="problem", data=document.error.detail)
            return
        result = await client.result(job_id)
        classes = [
            {"name": one.class_.name, "p": one.probability, "heat": result.urls[one.artifacts[0].uri]}
            for one in result.manifest.explanations
        ]
        shown = {"photo": result.urls[result.manifest.input.uri], "classes": classes}
        yield ServerSentEvent(event="result", data=shown)
    except GradcamError as error:
        yield ServerSentEvent(event="problem", data=sentence(error))


def sentence(error: GradcamError) -> str:
    """What is wrong with a job; and that something is wrong with our servers, but not what."""
    if isinstance(error, LocalError) and not isinstance(error, UnknownJob):
        logging.getLogger("uvicorn.error").error("%s", error)
        return "The service cannot be reached just now. Please try again in a minute."
    return str(error)


@app.exception_handler(GradcamError)
async def refuse(_: Request, error: GradcamError) -> JSONResponse:
    """A job that was not taken."""
    return JSONResponse({"detail": sentence(error)}, 503 if isinstance(error, LocalError) else 422)


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Where did it look?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>:root { color-scheme: light dark; --ink: light-dark(#16181d, #eceef2); --soft: light-dark(#5d6470, #a6adba);
  --line: light-dark(#d9dde5, #343943); --card: light-dark(#fff, #181b20); --go: light-dark(#3450c8, #8ea2ff) }
body { margin: 0; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: light-dark(#f3f4f8, #0e1013) }
main { max-width: 42rem; margin: auto; padding: 2rem 1rem } h1 { margin: 0; line-height: 1.2 } p { color: var(--soft) }
form, figure { display: grid; gap: .8rem; margin: 1rem 0; padding: 1.2rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px } [hidden], p:empty { display: none !important } p { margin: 0 }
input, button { font: inherit; color: inherit; box-sizing: border-box; width: 100%; padding: .6rem .8rem;
  border: 1px solid var(--line); border-radius: 8px; background: none; accent-color: var(--go) }
#go { border: 0; font-weight: 600; color: var(--card); background: var(--go) } #go:disabled { opacity: .5 }
progress, [type=range] { width: 100%; padding: 0; accent-color: var(--go) } #problem { color: light-dark(#b3261e, #ff9a92) }
#stack { display: grid; overflow: hidden; border-radius: 8px } #stack img { grid-area: 1 / 1; width: 100%; height: 100% }
#classes { display: grid; gap: .5rem } #classes button { display: flex; justify-content: space-between; text-align: left;
  background: linear-gradient(90deg, color-mix(in srgb, var(--go) 20%, transparent) var(--p), transparent 0) }
[aria-pressed=true] { border-color: var(--go) } :focus-visible { outline: 3px solid var(--go) }</style>
<main><h1>Where did it look?</h1><p>A network names what is in your photo, and shows which parts made it think so.</p>
<form id="form"><label>A photo <input id="photo" type="file" accept="image/*"></label>
<label>or its address <input id="uri" placeholder="s3://photos/cat.jpg" autocomplete="off" spellcheck="false"></label>
<button id="go">Explain</button><progress id="bar" hidden></progress><p id="told" role="status"></p>
<p id="problem" role="alert"></p></form>
<figure id="view" hidden><div id="stack"><img id="seen" alt="The photo"><img id="heat" alt="Heatmap over it"></div>
<label>Heatmap <input id="opacity" type="range" value="45"></label><div id="classes"></div></figure></main>
<script>const $ = id => document.getElementById(id), largest = LARGEST_MB * 1e6
const words = { queued: 'Waiting for its turn', retrying: 'Waiting for another try', fetch: 'Fetching the photo',
  decode: 'Reading the photo', load: 'Loading the network', explain: 'Looking', render: 'Drawing', upload: 'Storing' }
let key
function say(text, problem = '') {
  $('told').textContent = text; $('problem').textContent = problem
  $('bar').hidden = !text; $('go').disabled = !!text
}
const renew = () => { key = crypto.getRandomValues(new Uint32Array(4)).join('-') } // another job
$('photo').oninput = () => { $('uri').value = ''; renew() }
$('uri').oninput = () => { $('photo').value = ''; renew() }
$('opacity').oninput = () => { $('heat').style.opacity = $('opacity').value / 100 }
$('form').onsubmit = async event => {
  event.preventDefault()
  const body = $('photo').files[0], uri = $('uri').value.trim()
  if (!body && !uri) return say('', 'Choose a photo, or paste the address of one.')
  if (body?.size > largest) return say('', 'A photo may have LARGEST_MB MB; this one has more.')
  say('Sending')
  try {
    const answer = await fetch('jobs?' + new URLSearchParams({ key, uri }), { method: 'POST', body })
    const { id, detail } = await answer.json()
    if (id) follow(location.hash = id); else say('', String(detail))
  } catch { say('', 'The server cannot be reached. Please try again.') }
}
function follow(id) {
  const events = new EventSource('jobs/' + encodeURIComponent(id))
  const on = (name, act) => events.addEventListener(name, event => act(JSON.parse(event.data)))
  $('view').hidden = true
  on('progress', stage => say(words[stage] ?? 'Working'))
  on('result', seen => { events.close(); say(''); show(seen) })
  on('problem', detail => { events.close(); renew(); say('', detail) })
  events.onerror = () => events.readyState == 2 ? say('', 'The server cannot be reached.') : say('Connecting again')
}
function show({ photo, classes }) {
  const buttons = classes.map(({ name, p, heat }) => {
    const button = document.createElement('button'), share = (100 * p).toFixed(1) + ' %'
    button.append(name.replaceAll('_', ' '), ' ', share); button.style.setProperty('--p', 100 * p + '%')
    button.onclick = () => { $('heat').src = heat; buttons.forEach(one => { one.ariaPressed = one == button }) }
    return button
  })
  $('classes').replaceChildren(...buttons); $('seen').src = photo; buttons[0].click(); $('view').hidden = false
}
renew(); $('opacity').oninput(); if (location.hash) follow(location.hash.slice(1))</script>
""".replace("LARGEST_MB", str(LARGEST_MB))


@app.get("/")
async def page() -> HTMLResponse:
    """The page, in which nothing runs but what stands in it."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

"""Where did the network look? A page for a photo, or for the address of one. Copy it.

    pip install 'gradcam-worker[s3]' 'fastapi>=0.135' uvicorn
    uvicorn --app-dir docs/examples --timeout-graceful-shutdown 5 fastapi_app:app

In its environment: what `gradcam worker` has there, and GRADCAM_UPLOADS=s3://bucket/prefix. A URI may lead
below that alone, or below PAGE_IMAGES=s3://bucket/public,... The browser gets the pictures straight from the
bucket, by addresses that are good for an hour. Put your login before it.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from secrets import token_urlsafe

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.errors import GradcamError, PermanentError, UriNotAllowed

LARGEST = 16_000_000  # bytes of a photo; the page says so, too
PHOTO = {"kind": "overlay", "format": "webp", "alpha": 0.0, "max_edge": 1280}  # as browsers can show it
HEAT = PHOTO | {"format": "jpeg", "alpha": 1.0}  # nothing but colours: the page lays them over the photo
IMAGES = os.environ.get("PAGE_IMAGES", "").split(",")  # of what the worker can read: open to visitors
WISH = {"network": "efficientnet_lite0", "target": {"top_n": 3}, "artifacts": [PHOTO, HEAT]}
POLICY = "default-src 'none'; connect-src 'self'; img-src http: https: data:"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests, closed with the app."""
    async with AsyncGradcamClient() as app.state.client:
        yield


log = logging.getLogger("uvicorn.error")
app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.put("/jobs/{key}")
async def submit(request: Request, key: str, uri: str = "") -> JSONResponse:
    """The body is the photo, or `uri` says where it is. With the same `key` it is the same job."""
    client, wish = app.state.client, {**WISH, "idempotency_key": f"page {key}"}
    if uri and not client.is_upload(uri, *IMAGES):
        raise UriNotAllowed(uri)
    if uri:
        return JSONResponse({"id": await client.submit(image=uri, **wish)}, 202)
    if int(request.headers.get("content-length", LARGEST + 1)) > LARGEST:
        return JSONResponse({"detail": "A photo may have 16 MB; this one has more."}, 413)
    return JSONResponse({"id": await client.upload_and_submit(await request.body(), **wish)}, 202)


@app.get("/jobs/{job_id}", response_class=EventSourceResponse)
async def follow(job_id: str) -> AsyncIterator[ServerSentEvent]:
    """What becomes of a job, as it happens; until it is final, or the browser has gone."""
    try:
        async for document in app.state.client.stream(job_id):
            yield ServerSentEvent(event="progress", data=document.stage or document.status)
        if document.error:
            yield ServerSentEvent(event="problem", data=document.error.public_message)
            return
        seen = await app.state.client.result(job_id)
        classes = [
            {"name": one.class_.name, "p": one.probability}
            | {picture.media_type: seen.urls[picture.uri] for picture in one.artifacts}
            for one in seen.manifest.explanations
        ]
        yield ServerSentEvent(event="result", data=classes)
    except GradcamError as error:
        yield ServerSentEvent(event="problem", data=error.public_message)
        log.warning("job %r: %r", job_id, error)


@app.exception_handler(GradcamError)
async def refuse(_: Request, error: GradcamError) -> JSONResponse:
    """A job that was not taken: why is for the log; the visitor hears what he can do."""
    log.warning("%r", error)
    return JSONResponse({"detail": error.public_message}, 422 if isinstance(error, PermanentError) else 503)


@app.get("/")
async def page() -> HTMLResponse:
    """The page, in which nothing runs but what stands in it."""
    nonce = token_urlsafe()
    policy = f"{POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
    return HTMLResponse(PAGE.replace("NONCE", nonce), headers={"Content-Security-Policy": policy})


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Where did it look?</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style nonce="NONCE">:root { color-scheme: light dark; --go: light-dark(#3450c8, #8ea2ff) }
body { font: 1rem/1.5 system-ui, sans-serif; background: light-dark(#f3f4f8, #111) } h1, p { margin: 0 }
main { max-width: 38rem; margin: 1.5rem auto } #problem { color: light-dark(#b3261e, #ff9a92) }
form, figure { display: grid; gap: .8rem; margin: 1rem 0; padding: 1.2rem; border-radius: 14px }
form, figure, input, button { border: 1px solid light-dark(#ccd, #444); background: light-dark(#fff, #222) }
input, button { box-sizing: border-box; width: 100%; padding: .6rem .8rem; border-radius: 8px; font: inherit }
#go { border: 0; background: var(--go); color: light-dark(#fff, #111) } #go:disabled { opacity: .5 }
#stack, #classes { display: grid; gap: .5rem } img { grid-area: 1 / 1; width: 100%; border-radius: 8px }
#classes * { text-align: left; background: linear-gradient(90deg, light-dark(#def, #236) var(--p), #0000 0) }
[aria-pressed=true] { border-color: var(--go) } progress, [type=range] { width: 100%; padding: 0 }
progress, input { accent-color: var(--go) } [hidden], p:empty { display: none !important }</style>
<main><h1>Where did it look?</h1><p>What a network takes your photo for, and which parts made it think so.</p>
<form id="form"><label>A photo <input id="photo" type="file" accept="image/*"></label>
<label>or its address <input id="uri" placeholder="s3://photos/uploads/cat.jpg" autocomplete="off"></label>
<button id="go">Explain</button><progress id="bar" hidden></progress><p id="told" role="status"></p>
<p id="problem" role="alert"></p></form><figure id="view" hidden><div id="stack"><img id="seen" alt="Photo">
<img id="heat" alt="Heatmap"></div><label>Heatmap <input id="mix" type="range" value="45"></label>
<div id="classes"></div></figure></main><script nonce="NONCE">const $ = id => document.getElementById(id)
let events, key // of the job that the form describes: sent twice, it is one job
const renew = () => { key = crypto.getRandomValues(new Uint32Array(4)).join('-') }
const say = (told, wrong = '') => {
  $('told').innerText = told; $('problem').innerText = wrong; $('bar').hidden = !told; $('go').disabled = told
}
$('photo').oninput = () => { $('uri').value = ''; renew() }
$('uri').oninput = () => { $('photo').value = ''; renew() }
$('mix').oninput = () => { $('heat').style.opacity = $('mix').value / 100 }
$('form').onsubmit = async event => {
  event.preventDefault()
  const body = $('photo').files[0], uri = $('uri').value.trim()
  if (!body && !uri) return say('', 'Choose a photo, or paste the address of one.')
  if (body?.size > 16e6) return say('', 'A photo may have 16 MB; this one has more.')
  say('Sending')
  try {
    const answer = await fetch(`jobs/${key}?` + new URLSearchParams({ uri }), { method: 'PUT', body })
    const { id, detail } = await answer.json()
    if (id) follow(location.hash = id); else say('', detail)
  } catch { say('', 'The server cannot be reached. Please try again.') }
}
function follow(id) {
  events?.close(); events = new EventSource(`jobs/${encodeURIComponent(id)}`)
  const on = (name, act) => events.addEventListener(name, event => act(JSON.parse(event.data)))
  on('progress', stage => { say(`Your photo: ${stage}`); $('view').hidden = true })
  on('result', classes => { events.close(); say(''); show(classes, $('classes')) })
  on('problem', detail => { events.close(); renew(); say('', detail) })
  events.onerror = () => events.readyState == 2 ? say('', 'No more is told.') : say('Connecting again')
}
function show(classes, box) {
  $('seen').src = classes[0]['image/webp']; $('view').hidden = false; box.replaceChildren()
  for (const { name, p, 'image/jpeg': hot } of classes) {
    const one = box.appendChild(document.createElement('button')), share = `${(100 * p).toFixed(1)}%`
    one.textContent = `${name.replaceAll('_', ' ')}, ${share}`; one.style.setProperty('--p', share)
    one.onclick = () => { $('heat').src = hot; for (const it of box.children) it.ariaPressed = it == one }
  }
  box.firstChild.click()
}
renew(); $('mix').oninput(); if (location.hash) follow(location.hash.slice(1))</script>"""

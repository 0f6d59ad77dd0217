// Where did the network look? Submits an image to the HTTP API, waits, and prints what it saw.
//
//   npm start -- s3://photos/cat.jpg      an image that the worker can read
//   npm start -- photo.jpg                a file of this machine
//
// GRADCAM_API is the address of the API, GRADCAM_KEY an API key, where it asks for one. The types of every path,
// body and answer are in gradcam.ts, which `npm run client` makes from the API's own OpenAPI document.

import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import createClient from "openapi-fetch";
import type { components, paths } from "./gradcam.js";

const { GRADCAM_API = "http://127.0.0.1:8000", GRADCAM_KEY } = process.env;
const headers: Record<string, string> = GRADCAM_KEY ? { Authorization: `Bearer ${GRADCAM_KEY}` } : {};
const api = createClient<paths>({ baseUrl: GRADCAM_API, headers });

const network = "efficientnet_lite0";
const image = process.argv[2];
if (!image) throw new Error("usage: npm start -- IMAGE");

/** Submits a job. Sent twice under the same Idempotency-Key, it is one job. */
async function submit(image: string, key: string) {
  const params = { header: { "Idempotency-Key": key, Prefer: "wait=60" } };
  const body = { image, network, top_n: 2 };
  if (image.includes("://")) return api.POST("/v1/jobs", { params, body });
  const form = new FormData(); // the same fields, and the file in the place of its address
  form.append("image", new Blob([new Uint8Array(await readFile(image))]), basename(image));
  form.append("network", network);
  form.append("top_n", "2");
  return api.POST("/v1/jobs", { params, body, bodySerializer: () => form });
}

/** What the API says of a request that it refuses: problem details (RFC 9457). */
function refused(problem: components["schemas"]["RequestProblem"]): Error {
  const findings = (problem.errors ?? []).map((one) => one.detail);
  return new Error([`${problem.code}: ${problem.detail}`, ...findings].join(" "));
}

const submitted = await submit(image, randomUUID());
if (submitted.error) throw refused(submitted.error);
const job = submitted.data;
if (job.status !== "succeeded") throw new Error(`The job is ${job.status}. ${job.error?.public_message ?? ""}`);
for (const { name, probability } of job.predictions ?? []) console.log(name, probability.toFixed(3));

// Fresh addresses, which a browser can show for an hour.
const result = await api.GET("/v1/jobs/{job_id}/result", { params: { path: { job_id: job.id } } });
if (result.error) throw refused(result.error);
for (const one of result.data.manifest.explanations) {
  const overlay = one.artifacts.find(({ kind }) => kind === "overlay");
  if (overlay) console.log(one.class.name, result.data.urls[overlay.uri]?.slice(0, 4));
}

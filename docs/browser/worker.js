// Samples an exported network in a worker, with onnxruntime-web: UniPC for flow matching, as examples/onnx_sampling.py
// does. Messages: {id, label, seed, steps, guidance, device} in; {id, step, image} after each step out.
const file = (name) => new URL(name, import.meta.url).href;
const runtimes = {
  wasm: ["./ort/ort.wasm.bundle.min.mjs", "./ort/ort-wasm-simd-threaded.wasm"],
  webgpu: ["./ort/ort.webgpu.bundle.min.mjs", "./ort/ort-wasm-simd-threaded.asyncify.wasm"],
};
const opened = {};

const network = (async () => {
  const [properties, weights] = await Promise.all([
    fetch(file("nano.json")).then((answer) => answer.json()),
    fetch(file("nano.onnx")).then((answer) => answer.arrayBuffer()),
  ]);
  return { properties, weights };
})();

/** Load the runtime of a device, "wasm" or "webgpu", and the network into it. */
async function load(device) {
  const [bundle, wasm] = runtimes[device];
  const ort = await import(bundle);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // several threads need HTTP headers that simple web servers do not send
  ort.env.wasm.wasmPaths = { wasm: file(wasm) };
  const { weights } = await network;
  return { ort, session: await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: [device] }) };
}

/** Load once; after an error, the next call tries again. */
function open(device) {
  opened[device] ??= load(device);
  opened[device].catch(() => delete opened[device]);
  return opened[device];
}

/** Standard normal numbers from a seed: mulberry32 and the Box-Muller transform. */
function drawNoise(seed, length) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (((mixed ^ (mixed >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return Float32Array.from({ length }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

/** The share of noise before each step and after the last; the first is just below 1, as in diffusers. */
function noiseShares(steps) {
  const shares = Array.from({ length: steps }, (_, i) => Math.fround(i === 0 ? 1 - 1e-6 : 1 - (0.999 * i) / steps));
  return [...shares, 0];
}

const logSignalToNoise = (share) => Math.log(Math.fround(1 - share) / share);

/**
 * Take step i by UniPC of second order (arXiv 2302.04867): the predictor, or, given the clean image predicted after the
 * step, the corrector.
 */
function takeStep(x, i, shares, before, image, after) {
  const [share, next] = [shares[i], shares[i + 1]];
  const length = logSignalToNoise(next) - logSignalToNoise(share);
  const growth = Math.expm1(-length);
  const ratio = before === null ? 0 : length / (logSignalToNoise(share) - logSignalToNoise(shares[i - 1]));
  let [changeWeight, afterWeight] = [0.5, 0];
  if (after !== null && before === null) afterWeight = 0.5;
  else if (after !== null) {
    const first = (growth / -length - 1) / growth;
    const second = (2 * ((growth / -length - 1) / -length - 0.5)) / growth;
    changeWeight = (first - second) / (1 + 1 / ratio);
    afterWeight = first - changeWeight;
  }
  return x.map((value, j) => {
    let extrapolated = image[j];
    if (before !== null) extrapolated += changeWeight * ratio * (image[j] - before[j]);
    if (after !== null) extrapolated += afterWeight * (after[j] - image[j]);
    return (next / share) * value - (1 - next) * growth * extrapolated;
  });
}

let newest = 0; // a new request ends the one before

async function sample({ id, label, seed, steps, guidance, device }) {
  const own = ++newest;
  const { properties } = await network;
  const { ort, session } = await open(device);
  const shape = [1, properties.channels, ...properties.size];
  const length = shape.reduce((a, b) => a * b);
  const shares = noiseShares(steps);
  const noise = drawNoise(seed, length);
  let [x, start, before, last] = [noise, null, null, null]; // start: the corrected x before the step that led to x
  for (let i = 0; i < steps; i++) {
    const began = performance.now();
    const out = await session.run({
      x_t: new ort.Tensor("float32", x, shape),
      t: new ort.Tensor("float32", [shares[i] * properties.num_timesteps], [1]),
      y: new ort.Tensor("int64", [BigInt(label)], [1]),
      guidance: new ort.Tensor("float32", [guidance], []),
    });
    if (own !== newest) return;
    const velocity = out.prediction.data;
    const image = x.map((value, j) => Math.max(-1, Math.min(1, value - shares[i] * velocity[j])));
    if (i + 1 < steps) {
      start = i === 0 ? x : takeStep(start, i - 1, shares, before, last, image);
      x = takeStep(start, i, shares, last, image, null);
      [before, last] = [last, image];
    }
    postMessage({ id, step: i + 1, steps, image, noise, milliseconds: performance.now() - began });
    await new Promise((resolve) => setTimeout(resolve)); // lets a new request in
  }
}

onmessage = ({ data }) => {
  if (data.stop) newest++;
  else sample(data).catch((error) => postMessage({ error: String(error) }));
};
(async () => {
  const [{ properties }] = await Promise.all([network, open("wasm")]);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  postMessage({ properties, hasGpu: Boolean(adapter) });
})().catch((error) => postMessage({ error: String(error) }));
